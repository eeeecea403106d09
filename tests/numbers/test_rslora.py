"""rsLoRA (arXiv 2312.03732): the scale alpha/√r."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from number_tools import Net, hand_over, linear, nudge, only, pair
from torch import nn

import peft
import rankloom as rl
from rankloom.presets import rslora

RANKS = (16, 64, 256, 1024)


def test_rank_one_is_lora():
    """Must hold: r = 1 equals LoRA."""
    outputs = []
    for method in (rl.LoRA(r=1, lora_alpha=7), rslora(r=1, lora_alpha=7)):
        torch.manual_seed(3)
        model = linear()
        nudge(rl.attach(model, method))
        outputs.append(model(torch.ones(1, 6).double()))
    assert torch.equal(*outputs)


def test_scale_by_hand():
    """Mechanism: s = alpha/√r, and with rank_pattern each site takes its own r."""
    model = Net(a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    bank = rl.attach(model, rslora(r=4, lora_alpha=6), rank_pattern={"b": 9})
    assert [adapter.scaling for _, adapter in bank.adapters()] == [3.0, 2.0]


def _one_step(method: rl.LoRA) -> tuple[float, float]:
    """(output change after one SGD step, norm of the gradient of B), at width 256."""
    torch.manual_seed(0)
    model = linear(256, 256, dtype=torch.float32)
    bank = rl.attach(model, method)
    x = torch.randn(8, 256)
    before = model(x).detach()
    optimizer = torch.optim.SGD([p for _, p, _ in bank.trainable()], lr=1.0)
    torch.manual_seed(1)
    model(x).backward(torch.randn(8, 256) / 8)
    gradient = only(bank).B.grad.norm().item()
    optimizer.step()
    return (model(x).detach() - before).norm().item(), gradient


def test_change_does_not_depend_on_rank():
    """Must hold: after one SGD step at width 256 the output change stays within 30 % for r = 16 … 1024; under alpha/r it
    falls like 1/r. The gradient likewise: constant, against 1/√r."""
    stable = [_one_step(rslora(r=r, lora_alpha=16)) for r in RANKS]
    falling = [_one_step(rl.LoRA(r=r, lora_alpha=16)) for r in RANKS]
    changes, gradients = zip(*stable)
    assert max(changes) < 1.3 * min(changes)
    assert max(gradients) < 1.3 * min(gradients)
    for (big, big_g), (small, small_g) in itertools.pairwise(falling):
        assert big / small == pytest.approx(4.0, rel=0.35)
        assert big_g / small_g == pytest.approx(2.0, rel=0.2)
    for r, one, other in zip(RANKS, changes, falling):
        assert one / other[0] == pytest.approx(r, rel=1e-3)


def test_peft_agrees():
    """Must hold: a PEFT rslora adapter gives equal logits."""
    base, x = linear(dtype=torch.float32).eval(), torch.randn(4, 6)
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["fc"], use_rslora=True)
    model, wrapped = pair(base, rslora(r=4, lora_alpha=3), config)
    nudge(model.rankloom)
    hand_over(model.rankloom, wrapped)
    assert torch.allclose(model(x), wrapped(x), atol=1e-5)
    assert only(model.rankloom).scaling == pytest.approx(3 / math.sqrt(4))


def test_weights_keep_the_rule():
    """Must hold: scaling the adapter and back keeps alpha/√r."""
    model, x = linear(), torch.randn(4, 6).double()
    before = model(x)
    bank = rl.attach(model, rslora(r=4))
    nudge(bank)
    change = model(x) - before
    bank.use(default=0.5)
    assert torch.allclose(model(x) - before, change / 2, atol=1e-12)
    bank.use("default")
    assert torch.equal(model(x) - before, change)
