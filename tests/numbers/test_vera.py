"""VeRA (arXiv 2310.11454): one frozen random pair, two trained vectors a layer."""

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
from rankloom.methods.vera import VeRA


def _two(dtype=torch.float64):
    return Net(p=nn.Linear(6, 5, dtype=dtype), q=nn.Linear(6, 5, dtype=dtype))


def test_identity_and_first_gradient():
    """Must hold: identity at init; only b has a gradient at init; d starts at 0.1, b at 0."""
    model, x = _two(), torch.randn(3, 6).double()
    before = model(x)
    bank = rl.attach(model, VeRA(r=4))
    assert torch.equal(model(x), before)
    for _, adapter in bank.adapters():
        assert (adapter.lambda_d == 0.1).all()
        assert not adapter.lambda_b.any()
    model(x).square().sum().backward()
    for _, adapter in bank.adapters():
        assert adapter.lambda_b.grad.abs().min() > 0
        assert not adapter.lambda_d.grad.any()
        assert adapter.A.grad is None
        assert adapter.B.grad is None


def test_count():
    """Must hold: L equal layers train L(o+r) numbers."""
    assert count(rl.attach(_two(), VeRA(r=16))) == 2 * (5 + 16)


def test_one_storage():
    """Must hold: layers share the storage of A and B; narrower layers see its first columns and rows."""
    model = Net(p=nn.Linear(6, 5), q=nn.Linear(6, 3))
    bank = rl.attach(model, VeRA(r=4))
    p, q = (adapter for _, adapter in bank.adapters())
    assert p.A.data_ptr() == q.A.data_ptr()
    assert p.B.data_ptr() == q.B.data_ptr()
    assert p.A.shape == (4, 6)
    assert p.B.shape == (5, 4)
    nudge(bank)
    with torch.no_grad():
        want = torch.diag(q.lambda_b) @ q.B[:3] @ torch.diag(q.lambda_d) @ q.A
    assert torch.allclose(bank.delta("default")["q"], want, atol=1e-6)
    assert sum(p.numel() for n, p in model.named_parameters() if "vera_A" in n) == 4 * 6


def test_pair_comes_from_the_key():
    """Must hold: the pair is kaiming-uniform of its key, A with fan-in i and B with fan-in r; another key, another pair."""
    model = linear(200, 100, dtype=torch.float32)
    adapter = only(rl.attach(model, VeRA(r=50, projection_prng_key=7)))
    for tensor, fan_in in ((adapter.A, 200), (adapter.B, 50)):
        bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(fan_in)
        assert 0.98 * bound < tensor.abs().max() <= bound
        assert tensor.var().item() == pytest.approx(2 / fan_in, rel=0.05)
    other = only(rl.attach(linear(200, 100, dtype=torch.float32), VeRA(r=50, projection_prng_key=8)))
    assert not torch.equal(adapter.A, other.A)


def test_reload_without_projections():
    """Must hold: the vectors and the key alone give equal logits, whatever the state of the global generator."""
    base, x = _two(), torch.randn(3, 6).double()
    model = copy.deepcopy(base)
    bank = rl.attach(model, VeRA(r=8, projection_prng_key=3, save_projection=False))
    nudge(bank)
    vectors = {k: p.detach().clone() for k, p, _ in bank.tensors("default") if not k.startswith("shared:")}
    torch.manual_seed(99)
    again = copy.deepcopy(base)
    fresh = rl.attach(again, VeRA(r=8, projection_prng_key=3))
    with torch.no_grad():
        for key, parameter, _ in fresh.tensors("default"):
            if key in vectors:
                parameter.copy_(vectors[key])
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6)])
def test_peft_agrees(make):
    """Must hold by PEFT as an oracle: the same key makes bitwise the same pair, and the logits agree."""
    base, x = Net(p=make(), q=make()).eval(), torch.randn(3, 6)
    transposed = isinstance(base.p, Conv1D)
    config = peft.VeraConfig(
        r=4, target_modules=["p", "q"], projection_prng_key=11, fan_in_fan_out=transposed, save_projection=False
    )
    model, wrapped = pair(base, VeRA(r=4, projection_prng_key=11), config)
    shared = wrapped.base_model
    adapter = next(a for _, a in model.rankloom.adapters())
    assert torch.equal(shared.vera_A["default"], adapter.A)
    assert torch.equal(shared.vera_B["default"], adapter.B)
    nudge(model.rankloom)
    hand_over(model.rankloom, wrapped)
    assert torch.allclose(model(x), wrapped(x), atol=1e-5)


def test_merge_is_exact():
    """Must hold: merged equals unmerged, and unmerge restores W."""
    model, x = _two(), torch.randn(3, 6).double()
    weight = model.p.weight.detach().clone()
    bank = rl.attach(model, VeRA(r=4))
    nudge(bank)
    spoken = model(x)
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-12)
    bank.unmerge()
    assert torch.equal(model.p.weight, weight)


def test_is_tied_lora_with_frozen_factors():
    """Must hold: equals Tied-LoRA with A, B frozen: z = v ⊙ B (u ⊙ A x) with v = b, u = d."""
    model, x = _two(), torch.randn(3, 6).double()
    before = model(x)
    bank = rl.attach(model, VeRA(r=4))
    nudge(bank)
    parts = []
    for _, a in bank.adapters():
        u, v = a.lambda_d, a.lambda_b
        parts.append(v * ((u * (x @ a.A.T)) @ a.B.T))
    assert torch.allclose(model(x) - before, torch.cat(parts, -1), atol=1e-12)


def test_enough_rank_reaches_any_change():
    """Must hold: with r ≥ o·i the d alone can make any change; with small r it cannot."""
    torch.manual_seed(4)
    target = torch.randn(4, 3).double()
    losses = []
    for r in (3, 24):
        model = linear(3, 4, bias=False)
        bank = rl.attach(model, VeRA(r=r))
        adapter, x = only(bank), torch.eye(3).double()
        want = (model.fc.weight.detach() + target).T
        with torch.no_grad():
            adapter.lambda_b.fill_(1.0)
        losses.append(minimise([adapter.lambda_d], lambda m=model, x=x, w=want: (m(x) - w).square().sum(), 300))
    assert losses[0] > 1.0
    assert losses[1] < 1e-6


def test_dtype_and_device_do_not_change_the_pair():
    """Pitfall: the generator lives on the CPU and in float32: half-precision bases get the same pair."""
    single = only(rl.attach(linear(dtype=torch.float32), VeRA(r=4)))
    half = only(rl.attach(linear(dtype=torch.bfloat16), VeRA(r=4)))
    meta = linear(dtype=torch.float32).to("meta")
    assert torch.equal(single.A, half.A.to(torch.float32))
    assert only(rl.attach(meta, VeRA(r=4))).A.shape == (4, 6)
