"""DoRA (arXiv 2402.09353): the row directions of W + ΔW, with trained lengths."""

from __future__ import annotations

import pytest
import torch
from number_tools import Net, count, hand_over, linear, nudge, only, pair
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft
import rankloom as rl
from rankloom.errors import TargetError
from rankloom.methods.adalora import AdaLoRA
from rankloom.methods.vera import VeRA

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda: torch.randn(3, 4, 6), 2 * (6 + 5) + 5),
    "transposed": (lambda: Conv1D(5, 6), lambda: torch.randn(3, 4, 6), 2 * (6 + 5) + 5),
    "embedding": (lambda: nn.Embedding(11, 5), lambda: torch.randint(11, (3, 4)), 2 * (11 + 5) + 5),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding=1), lambda: torch.randn(2, 6, 9), 2 * (6 * 3 + 4) + 4),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, stride=2), lambda: torch.randn(2, 6, 7, 7), 2 * (6 * 9 + 4) + 4),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), lambda: torch.randn(1, 2, 4, 5, 5), 2 * (2 * 27 + 4) + 4),
}


def _rows(layer: nn.Module) -> torch.Tensor:
    """The (out, in) matrix of a layer of LAYERS."""
    turned = isinstance(layer, (nn.Embedding, Conv1D))
    return layer.weight.T if turned else layer.weight.flatten(1)


@pytest.mark.parametrize("kind", LAYERS)
def test_identity_count_norms_merge(kind):
    """Must hold: identity at init; r(o+i)+o numbers; row norms of the merged weight equal m; merged equals unmerged."""
    make, batch, numbers = LAYERS[kind]
    model, x = Net(layer=make()).eval(), batch()
    before = model(x)
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2, lora_alpha=3)), target_modules=["layer"])
    assert torch.equal(model(x), before)
    assert count(bank) == numbers
    nudge(bank, 0.2)
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-5)
    norms = torch.linalg.vector_norm(_rows(model.layer), dim=1)
    assert torch.allclose(norms, only(bank).magnitude.abs(), rtol=1e-5)


def test_equation_by_hand():
    """Mechanism: W' = diag(m/‖V‖) V with V = W + s B A; 3-4-5 rows."""
    model = linear(2, 2)
    adapter = only(rl.attach(model, rl.DoRA(rl.LoRA(r=1, lora_alpha=2))))
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor([[1.0, 4.0], [6.0, 8.0]]))
        model.fc.bias.copy_(torch.tensor([100.0, 200.0]))
        adapter.inner.A.copy_(torch.tensor([[1.0, 0.0]]))
        adapter.inner.B.copy_(torch.tensor([[1.0], [0.0]]))  # V = [[3, 4], [6, 8]], norms 5 and 10
        adapter.magnitude.copy_(torch.tensor([10.0, 5.0]))
    y = model(torch.tensor([[1.0, 1.0]]).double())
    assert torch.allclose(y, torch.tensor([[100 + 2 * 7, 200 + 7.0]]).double(), atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding", "conv2d", "conv1d"])
def test_peft_agrees(kind):
    """Must hold by PEFT as an oracle: equal logits after the tensors are handed over."""
    make, batch, _ = LAYERS[kind]
    base, x = Net(layer=make()).eval(), batch()
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["layer"], use_dora=True, fan_in_fan_out=kind == "transposed"
    )
    model, wrapped = pair(base, rl.DoRA(rl.LoRA(r=2, lora_alpha=3)), config, target_modules=["layer"])
    nudge(model.rankloom, 0.2)
    keys = {"layer.inner.": "layer."}
    if kind == "embedding":
        keys |= {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
    hand_over(model.rankloom, wrapped, **keys)
    assert torch.allclose(model(x), wrapped(x), atol=1e-5)


def test_peft_agrees_under_dropout():
    """Pitfall: dropout hits the W x term too, with the mask of the change; same seed, same output as PEFT."""
    base, x = linear(dtype=torch.float32), torch.randn(9, 6)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["fc"], use_dora=True, lora_dropout=0.5)
    model, wrapped = pair(base, rl.DoRA(rl.LoRA(r=2, lora_alpha=3, lora_dropout=0.5)), config)
    nudge(model.rankloom, 0.2)
    hand_over(model.rankloom, wrapped)
    model.train(), wrapped.train()
    outputs = []
    for m in (model, wrapped):
        torch.manual_seed(5)
        outputs.append(m(x))
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[0], model.eval()(x), atol=1e-3)


def _gradients(method, x, g):
    torch.manual_seed(2)
    model = linear()
    bank = rl.attach(model, method)
    inner = only(bank) if isinstance(method, rl.LoRA) else only(bank).inner
    with torch.no_grad():
        inner.B.normal_()
    model(x).backward(g)
    return model, only(bank), inner


def test_frozen_length_is_lora():
    """Must hold: with m frozen at ‖V‖ it equals LoRA."""
    x = torch.randn(4, 6).double()
    model, dora, _ = _gradients(rl.DoRA(rl.LoRA(r=3)), x, torch.zeros(4, 5).double())
    lora, _, _ = _gradients(rl.LoRA(r=3), x, torch.zeros(4, 5).double())
    with torch.no_grad():
        dora.magnitude.copy_(torch.linalg.vector_norm(model.fc.weight + dora.inner.delta(None), dim=1))
    assert torch.allclose(model(x), lora(x), atol=1e-12)


def test_detached_gradient():
    """Must hold: with the norm detached, the gradients of A and B are m/‖V‖ (by row) times LoRA's."""
    x, g = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    model, dora, inner = _gradients(rl.DoRA(rl.LoRA(r=3)), x, g)
    ratio = dora.magnitude / torch.linalg.vector_norm(model.fc.weight + inner.delta(None), dim=1)
    _, _, same = _gradients(rl.LoRA(r=3), x, g)
    _, _, scaled = _gradients(rl.LoRA(r=3), x, (g * ratio).detach())
    assert torch.allclose(inner.B.grad, ratio[:, None] * same.B.grad, rtol=1e-10)
    assert torch.allclose(inner.A.grad, scaled.A.grad, rtol=1e-10)
    assert (ratio - 1).abs().max() > 0.05


def test_attached_gradient_is_orthogonal():
    """Must hold: with the norm in the graph, the gradient of each row of V is orthogonal to that row."""
    model = linear(6, 5)
    adapter = only(rl.attach(model, rl.DoRA(rl.LoRA(r=6, lora_alpha=6), detach_norm=False)))
    with torch.no_grad():
        adapter.inner.A.copy_(torch.eye(6))
        adapter.inner.B.normal_()
    x, g = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    model(x).backward(g)
    v = model.fc.weight + adapter.inner.B
    gradient = adapter.inner.B.grad
    assert (gradient * v).sum(1).abs().max() < 1e-12
    assert gradient.norm(dim=1).min() > 1e-2
    detached = linear(6, 5)
    detached.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k.startswith("fc.") and "adapters" not in k}
    )
    other = only(rl.attach(detached, rl.DoRA(rl.LoRA(r=6, lora_alpha=6))))
    with torch.no_grad():
        for own, theirs in zip(other.parameters(), adapter.parameters()):
            own.copy_(theirs)
    detached(x).backward(g)
    assert (other.inner.B.grad * v).sum(1).abs().max() > 1e-2


def test_scaling_a_row_changes_nothing():
    """Must hold: multiplying a row of V by c > 0 leaves W' unchanged."""
    model = linear()
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2)))
    nudge(bank)
    adapter, x = only(bank), torch.randn(4, 6).double()
    before = model(x)
    c = torch.tensor([1.0, 0.1, 3.0, 7.0, 0.5]).double()[:, None]
    with torch.no_grad():
        model.fc.weight.mul_(c)
        adapter.inner.B.mul_(c)
    assert torch.allclose(model(x), before, atol=1e-12)


def test_zero_rows():
    """Pitfall: a zero row of V is guarded: finite output and gradients, identity at start."""
    model, x = linear(), torch.randn(4, 6).double()
    with torch.no_grad():
        model.fc.weight[2] = 0
    before = model(x)
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2), detach_norm=False))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for _, p, _ in bank.trainable())


@pytest.mark.parametrize("inner", [rl.LoRA(r=2, lora_bias=True), VeRA(r=4), AdaLoRA(init_r=3, target_r=2)])
def test_any_mergeable_inner(inner):
    """Combinator: identity, merge and norms hold around other methods, and an inner bias is merged too."""
    model, x = linear().eval(), torch.randn(4, 6).double()
    before = model(x)
    bank = rl.attach(model, rl.DoRA(inner))
    assert torch.allclose(model(x), before, atol=1e-13)
    nudge(bank)
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-10)
    assert torch.allclose(torch.linalg.vector_norm(model.fc.weight, dim=1), only(bank).magnitude.abs(), rtol=1e-10)


def test_magnitude_only_modules():
    """Interface: the named sites train m alone, and merge; a name that matches nothing is refused and leaves no trace."""
    model = Net(p=nn.Linear(6, 5), q=nn.Linear(6, 5))
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2), magnitude_only_modules=("q",)))
    trained = [k for k, _, _ in bank.trainable()]
    assert [k for k in trained if "/q:" in k] == ["default/q:magnitude"]
    assert len([k for k in trained if "/p:" in k]) == 3
    fresh = Net(p=nn.Linear(6, 5))
    with pytest.raises(TargetError, match="magnitude_only_modules: 'z'"):
        rl.attach(fresh, rl.DoRA(rl.LoRA(r=2), magnitude_only_modules=("z",)))
    assert type(fresh.p) is nn.Linear


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_column_norms(kind):
    """Interface: the paper's text instead: m in R^i, and the column norms of the merged weight equal m."""
    make, batch, _ = LAYERS[kind]
    model, x = Net(layer=make()).eval(), batch()
    before = model(x)
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2), norm_axis="column"), target_modules=["layer"])
    assert torch.equal(model(x), before)
    nudge(bank, 0.2)
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-5)
    norms = torch.linalg.vector_norm(_rows(model.layer), dim=0)
    assert torch.allclose(norms, only(bank).magnitude.abs(), rtol=1e-5)
