"""QLoRA (arXiv 2305.14314): LoRA on an NF4 base. The storage itself is tested in tests/store."""

from __future__ import annotations

import copy

import pytest
import torch
from number_tools import Net, count, nudge, only
from torch import nn

import rankloom as rl
from rankloom.store import dense
from rankloom.store.base import Packed
from rankloom.store.model import keep, unpack
from rankloom.store.normalfloat import NormalFloat


def _pair(dtype=torch.float32):
    """The same net on an NF4 base with double quantisation, and on its unpacked twin; LoRA with equal factors."""
    model = Net(fc=nn.Linear(128, 64, dtype=dtype))
    keep(model, {"fc.weight": NormalFloat()})
    twin = copy.deepcopy(model)
    unpack(twin)
    banks = []
    for each in (model, twin):
        torch.manual_seed(3)
        banks.append(rl.attach(each, rl.LoRA(r=4, lora_alpha=8)))
        nudge(banks[-1])
    return model, twin, *banks


def test_forward_is_dequantised_base_plus_lora():
    """Mechanism: y = x deq(W)ᵀ + b + s B A x, worked out from the parts."""
    model, _, bank, _ = _pair()
    adapter, x = only(bank), torch.randn(5, 128)
    parts = model.fc.weight.parts
    store = model.fc.weight.store
    deq = store.decode(parts, torch.Size([64, 128]), torch.float32)
    want = x @ deq.T + model.fc.bias + 2.0 * x @ adapter.A.T @ adapter.B.T
    assert torch.allclose(model(x), want, atol=1e-5)


def test_gradients_only_to_the_factors():
    """Must hold: no gradient on codes; gradients of A and B are those of LoRA on the dequantised base."""
    model, twin, bank, other = _pair()
    x, g = torch.randn(5, 128), torch.randn(5, 64)
    for each in (model, twin):
        each(x).backward(g)
    assert count(bank) == 4 * (128 + 64)
    for (_, mine, _), (_, theirs, _) in zip(bank.trainable(), other.trainable()):
        assert mine.grad.any()
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    assert model.fc.weight.grad is None
    assert all(p.grad is None and not p.requires_grad for p in model.fc.weight.parts.values())


def test_training_equals_the_dequantised_twin():
    """Ten AdamW steps on the packed base and on its dequantised twin: the same trajectory, and not a byte moves."""
    model, twin, bank, other = _pair(torch.float64)
    before = {n: p.clone() for n, p in model.fc.weight.parts.items()}
    x, target = torch.randn(16, 128).double(), torch.randn(16, 64).double()
    losses = []
    for each, b in ((model, bank), (twin, other)):
        optimizer = torch.optim.AdamW([p for _, p, _ in b.trainable()], lr=1e-2)
        for _ in range(10):
            loss = (each(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert all(torch.equal(p, before[n]) for n, p in model.fc.weight.parts.items())


def test_merge_returns_floating_weights():
    """Must hold: the merge is deq(W) + s B A in the model's dtype; re-quantising it would lose (pitfall), unmerge does not."""
    model, _, bank, _ = _pair()
    x, packed = torch.randn(5, 128), model.fc.weight
    spoken = model(x)
    bank.merge("default")
    assert type(model.fc.weight) is nn.Parameter
    assert torch.allclose(model.fc.weight, dense(packed) + bank.delta("default")["fc"], atol=1e-6)
    assert torch.allclose(model(x), spoken, atol=1e-5)
    again = NormalFloat().round_trip(model.fc.weight)
    assert (again - model.fc.weight).norm() > 0.05 * bank.delta("default")["fc"].norm()
    bank.unmerge()
    assert model.fc.weight is packed


def test_memory_of_a_model():
    """Headline: 4.13 bits for each packed weight, 3.9 times less than 16-bit; the head may stay as it is."""
    model = nn.ModuleDict({f"l{i}": nn.Linear(256, 256, bias=False) for i in range(4)} | {"head": nn.Linear(256, 16)})
    model.bfloat16()
    saving = keep(model, {f"l{i}.weight": NormalFloat() for i in range(4)})
    assert saving.bits_per_weight == pytest.approx(4.127, abs=0.001)
    assert saving.before / saving.after == pytest.approx(16 / 4.127, rel=1e-3)
    assert not isinstance(model["head"].weight, Packed)
