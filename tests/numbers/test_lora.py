"""LoRA (arXiv 2106.09685): what must hold, by hand, by planted change, and against PEFT."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from number_tools import Net, count, hand_over, linear, minimise, nudge, only, pair
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.methods.slices import Slices
from rankloom.methods.unrolled import UnrolledLoRA

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6), 2 * (6 + 5)),
    "transposed": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 4, 6), 2 * (6 + 5)),
    "embedding": (lambda: nn.Embedding(11, 5), lambda: torch.randint(11, (3, 4)), 2 * (11 + 5)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1), lambda: torch.randn(2, 6, 9), 2 * (6 * 3 + 4)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, padding=1), lambda: torch.randn(2, 6, 7, 7), 2 * (6 * 9 + 4)),
    "conv2d_1x1": (lambda: nn.Conv2d(6, 4, 1), lambda: torch.randn(2, 6, 5, 5), 2 * (6 + 4)),
    "conv2d_groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), lambda: torch.randn(2, 6, 7, 7), 2 * (3 * 9 + 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), lambda: torch.randn(1, 2, 4, 5, 5), 2 * (2 * 27 + 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_identity_count_and_merge(kind):
    """Must hold: identical to base at init; count r(o+i); merged equals unmerged to 1e-5; unmerge restores W; base only is bitwise."""
    make, batch, numbers = LAYERS[kind]
    model, x = Net(layer=make()).eval(), batch()
    before, weight = model(x), model.layer.weight.detach().clone()
    bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=3), target_modules=["layer"])
    assert torch.equal(model(x), before)
    assert count(bank) == numbers
    nudge(bank)
    spoken = model(x)
    assert (spoken - before).abs().max() > 1e-2
    with bank.using():
        assert torch.equal(model(x), before)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-5)
    assert not torch.equal(model.layer.weight, weight)
    bank.unmerge()
    assert torch.equal(model.layer.weight, weight)
    assert torch.equal(model(x), spoken)


def test_first_gradients():
    """Must hold: at init grad_A = 0 and grad_B = s g (A x)ᵀ exactly."""
    model = linear()
    adapter = only(rl.attach(model, rl.LoRA(r=3, lora_alpha=6)))
    x, g = torch.randn(1, 6).double(), torch.randn(1, 5).double()
    model(x).backward(g)
    assert not adapter.A.grad.any()
    assert torch.allclose(adapter.B.grad, 2.0 * g.T @ (x @ adapter.A.T), rtol=1e-14, atol=1e-15)
    assert adapter.B.grad.abs().min() > 0


def test_equation_by_hand():
    """Mechanism: y = W x + b + (alpha/r) B A x on numbers that can be worked out on paper."""
    model = linear(2, 2)
    adapter = only(rl.attach(model, rl.LoRA(r=1, lora_alpha=3)))
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model.fc.bias.copy_(torch.tensor([10.0, 20.0]))
        adapter.A.copy_(torch.tensor([[1.0, -1.0]]))
        adapter.B.copy_(torch.tensor([[2.0], [5.0]]))
    assert model(torch.tensor([[4.0, 1.0]]).double()).tolist() == [[6 + 10 + 3 * 2 * 3, 16 + 20 + 3 * 5 * 3]]


def _planted(r: int) -> float:
    torch.manual_seed(1)
    model = linear(6, 5, bias=False)
    u, v = torch.linalg.qr(torch.randn(5, 3).double())[0], torch.linalg.qr(torch.randn(6, 3).double())[0]
    target = model.fc.weight.detach() + u @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) @ v.T
    bank = rl.attach(model, rl.LoRA(r=r))
    x = torch.eye(6).double()
    loss = minimise([p for _, p, _ in bank.trainable()], lambda: (model(x) - x @ target.T).square().sum())
    assert torch.linalg.matrix_rank(bank.delta("default")["fc"], tol=1e-6) == r
    return loss


def test_planted_rank():
    """Must hold: a planted rank-3 change is learned to 1e-6 at rank 3, and rank 2 stops at the smallest singular value squared; rank(ΔW) ≤ r."""
    assert _planted(3) < 1e-6
    assert _planted(2) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding", "conv2d", "conv1d"])
def test_peft_agrees(kind):
    """Must hold: state dict loads into PEFT and back with equal logits."""
    make, batch, _ = LAYERS[kind]
    base, x = Net(layer=make()).eval(), batch()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["layer"], fan_in_fan_out=kind == "transposed")
    model, wrapped = pair(base, rl.LoRA(r=2, lora_alpha=3), config, target_modules=["layer"])
    nudge(model.rankloom)
    names = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"} if kind == "embedding" else {}
    hand_over(model.rankloom, wrapped, **names)
    assert torch.allclose(model(x), wrapped(x), atol=1e-5)
    theirs = peft.get_peft_model_state_dict(wrapped)
    fresh = copy.deepcopy(base)
    adapter = only(rl.attach(fresh, rl.LoRA(r=2, lora_alpha=3), target_modules=["layer"]))
    with torch.no_grad():
        for own in ("A", "B"):
            (value,) = [v for k, v in theirs.items() if f"_{own}" in k]
            getattr(adapter, own).copy_(value.reshape(getattr(adapter, own).shape))
    assert torch.allclose(fresh(x), wrapped(x), atol=1e-5)


def test_starts_spread():
    """Pitfall: kaiming is U(±1/√i), variance 1/(3i), whatever r; gaussian has deviation 1/r; the embedding swaps the roles."""
    i = 400
    for r in (4, 16):
        model = linear(i, 3, dtype=torch.float32)
        a = only(rl.attach(model, rl.LoRA(r=r))).A
        assert a.abs().max() <= 1 / math.sqrt(i)
        assert a.var().item() == pytest.approx(1 / (3 * i), rel=0.1)
        model = linear(i, 3, dtype=torch.float32)
        a = only(rl.attach(model, rl.LoRA(r=r, init_lora_weights="gaussian"))).A
        assert a.std().item() == pytest.approx(1 / r, rel=0.1)
    table = only(rl.attach(Net(layer=nn.Embedding(300, 20)), rl.LoRA(r=4), target_modules=["layer"]))
    assert not table.A.any()
    assert table.B.std().item() == pytest.approx(1.0, rel=0.2)


def test_orthogonal_start():
    """Start: A A^T = I, B = 0."""
    adapter = only(rl.attach(linear(), rl.LoRA(r=4, init_lora_weights="orthogonal")))
    assert torch.allclose(adapter.A @ adapter.A.T, torch.eye(4).double(), atol=1e-12)
    assert not adapter.B.any()


def test_svd_start():
    """Start "svd": identity, and A spans the principal right subspace of W."""
    model, x = linear(), torch.randn(4, 6).double()
    before = model(x)
    adapter = only(rl.attach(model, rl.LoRA(r=2, init_lora_weights="svd")))
    assert torch.equal(model(x), before)
    w = model.fc.weight.detach()
    captured = (w @ adapter.A.T @ adapter.A).square().sum()
    assert captured.item() == pytest.approx(torch.linalg.svdvals(w)[:2].square().sum().item(), rel=1e-6)


def test_pissa_start():
    """Start "pissa": identity; s B A is the best rank-r part of W; factors are balanced; the base is not rewritten; PEFT agrees."""
    base, x = linear(dtype=torch.float32), torch.randn(4, 6)
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["fc"], init_lora_weights="pissa")
    model, wrapped = pair(base, rl.LoRA(r=2, lora_alpha=5, init_lora_weights="pissa"), config)
    assert torch.equal(model(x), base(x))
    assert torch.equal(model.fc.weight, base.fc.weight)
    residual = only(model.rankloom)
    inner, s = residual.inner, 2.5
    u, sigma, vh = torch.linalg.svd(base.fc.weight.detach())
    best = u[:, :2] @ torch.diag(sigma[:2]) @ vh[:2]
    assert torch.allclose(s * inner.B @ inner.A, best, atol=1e-6)
    assert torch.allclose(inner.A @ inner.A.T, inner.B.T @ inner.B, atol=1e-6)
    theirs = wrapped.base_model.model.fc
    product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert torch.allclose(product, inner.B @ inner.A, atol=1e-5)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, wrapped)]
    for m, optimizer in zip((model, wrapped), optimizers):
        m(x).square().sum().backward()
        optimizer.step()
    assert torch.allclose(model(x), wrapped(x), atol=1e-5)
    assert not torch.allclose(model(x), base(x), atol=1e-3)


def test_pissa_start_knows_no_dropout():
    """The frozen start stands for a part of W: only the trained pair drops its input, as when W is rewritten."""
    model = linear(1, 1, bias=False)
    bank = rl.attach(model, rl.LoRA(r=1, lora_alpha=1, init_lora_weights="pissa", lora_dropout=0.5))
    weight = model.fc.weight.item()
    outputs = {round(model(torch.ones(1, 1).double()).item() / weight, 5) for _ in range(40)}
    assert outputs == {0.0, 2.0}
    bank.model.eval()
    assert model(torch.ones(1, 1).double()).item() == pytest.approx(weight)


def test_dropout_by_hand():
    """Mechanism: the change sees drop(x), the base does not; kept elements grow by 1/(1-p)."""
    model = linear(1, 1, bias=False)
    adapter = only(rl.attach(model, rl.LoRA(r=1, lora_alpha=1, lora_dropout=0.75)))
    with torch.no_grad():
        adapter.A.fill_(1.0)
        adapter.B.fill_(1.0)
        model.fc.weight.fill_(10.0)
    x = torch.ones(200, 1).double()
    assert set(model(x).flatten().tolist()) == {10.0, 14.0}
    assert set(model.eval()(x).flatten().tolist()) == {11.0}


def test_unmerge_in_bf16_does_not_drift():
    """Pitfall: fifty merges and unmerges in bf16 leave W bit for bit."""
    model = linear(6, 5, dtype=torch.bfloat16)
    weight = model.fc.weight.detach().clone()
    bank = rl.attach(model, rl.LoRA(r=2))
    nudge(bank)
    for _ in range(50):
        bank.merge("default")
        bank.unmerge()
    assert torch.equal(model.fc.weight, weight)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 6), lambda: Conv1D(6, 4)])
def test_fused_slices(make):
    """Mechanism, pitfall: one A and B for each enabled slice of a fused matrix, zero elsewhere, also stored transposed."""
    model, x = Net(qkv=make()).eval(), torch.randn(3, 4)
    before = model(x)
    bank = rl.attach(model, Slices(rl.LoRA(r=1), parts=3, on=(0, 2)), target_modules=["qkv"])
    assert count(bank) == 2 * (4 + 2)
    nudge(bank)
    change = model(x) - before
    assert torch.equal(change[:, 2:4], torch.zeros(3, 2))
    assert change[:, :2].abs().min() > 0
    assert change[:, 4:].abs().min() > 0
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-5)


def test_unrolled_convolution():
    """Mechanism (reference code): A (r k, i k), B (o k, r k), BA reshaped to the kernel."""
    model, x = Net(layer=nn.Conv2d(3, 4, 3).double()), torch.randn(1, 3, 5, 5).double()
    bank = rl.attach(model, UnrolledLoRA(r=2, lora_alpha=4), target_modules=["layer"])
    assert count(bank) == 2 * 3 * (3 * 3 + 4 * 3)
    nudge(bank)
    adapter = only(bank)
    kernel = model.layer.weight + 2.0 * (adapter.B @ adapter.A).view(4, 3, 3, 3)
    want = nn.functional.conv2d(x, kernel, model.layer.bias)
    assert torch.allclose(model(x), want, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"r": 0}, {"init_lora_weights": "kaimin"}, {"lora_dropout": 1.0}, {"frozen": "B"}]
)
def test_impossible_settings(settings):
    """Refused by name before anything is built."""
    with pytest.raises(SettingsError):
        rl.LoRA(**settings)
