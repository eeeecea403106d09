"""QDyLoRA (arXiv 2402.10462): DyLoRA on a QLoRA base."""

from __future__ import annotations

import copy

import torch
from number_tools import Net, drive, only, stage
from torch import nn

import rankloom as rl
from rankloom.methods.dylora import DyLoRA, set_rank, truncate
from rankloom.store.base import Packed
from rankloom.store.model import keep, unpack
from rankloom.store.normalfloat import NormalFloat


def _models():
    """The same net in bf16's place: NF4 with double quantisation, and dequantised, in float64."""
    torch.manual_seed(0)
    packed = Net(fc=nn.Linear(128, 32, dtype=torch.float64))
    keep(packed, {"fc.weight": NormalFloat()})
    plain = copy.deepcopy(packed)
    unpack(plain)
    return packed, plain


def _train(model, method, steps=15):
    torch.manual_seed(1)
    bank = rl.attach(model, method)
    x, target = torch.randn(16, 128).double(), torch.randn(16, 32).double()
    run = stage(model, steps, torch.optim.AdamW([p for _, p, _ in bank.trainable()], lr=0.01))
    losses = drive(run, method.rules(), lambda: (model(x) - target).square().mean())
    return bank, losses


def test_equals_dylora_at_sixteen_bits():
    """Must hold: it is DyLoRA on the (dequantised) base: the same trajectory and the same factors."""
    packed, plain = _models()
    (mine, a), (theirs, b) = _train(packed, DyLoRA(r=4)), _train(plain, DyLoRA(r=4))
    assert torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-10)
    assert torch.allclose(only(mine).B, only(theirs).B, atol=1e-10)
    assert a[-1] < a[0]


def test_equals_qlora_at_a_point_mass():
    """Must hold: with all chance at r_max, and not frozen, it is QLoRA (alpha/b is alpha/r there)."""
    mine, a = _train(_models()[0], DyLoRA(r=4, lora_alpha=8.0, frozen=False, rank_distribution=(0, 0, 0, 1)))
    theirs, b = _train(_models()[0], rl.LoRA(r=4, lora_alpha=8.0))
    assert torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-12)
    assert torch.allclose(only(mine).A, only(theirs).A, atol=1e-12)
    assert torch.allclose(only(mine).B, only(theirs).B, atol=1e-12)


def test_truncate_equals_evaluation_at_the_rank():
    """Must hold: truncate(b) gives the output of an evaluation at rank b; it merges to a dense weight there."""
    packed, _ = _models()
    bank, _ = _train(packed, DyLoRA(r=4))
    x = torch.randn(3, 128).double()
    set_rank(bank, 2)
    want = packed(x)
    truncate(bank, 2)
    assert torch.allclose(packed(x), want, rtol=1e-12)
    bank.merge("default")
    assert torch.allclose(packed(x), want, atol=1e-12)


def test_codes_stay_and_memory_is_below_half_precision():
    """Must hold: not a byte of the base changes through training; its memory is a quarter of fp16's."""
    packed, _ = _models()
    before = {n: p.clone() for n, p in packed.fc.weight.parts.items()}
    _train(packed, DyLoRA(r=8, frozen=False))
    weight = packed.fc.weight
    assert isinstance(weight, Packed)
    assert all(torch.equal(p, before[n]) for n, p in weight.parts.items())
    assert weight.stored_bytes < 0.27 * 2 * weight.numel()
