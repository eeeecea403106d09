"""What a layer was found to be is kept between calls: whatever changes must be noticed by the next one."""

from __future__ import annotations

import pytest
import torch
from core_tiny import nudge
from torch import nn

import rankloom as rl

D = torch.float64
METHODS = {"lora": rl.LoRA(r=2, lora_dropout=0.5), "dora": rl.DoRA(rl.LoRA(r=2)), "bias": rl.LoRA(r=2, lora_bias=True)}


def swap_weight(model, bank):
    model[0]._parameters["weight"] = nn.Parameter(torch.randn(6, 6, dtype=D), requires_grad=False)


def write_weight(model, bank):
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"].mul_(2)


def swap_bias(model, bank):
    model[0]._parameters["bias"] = nn.Parameter(torch.randn(6, dtype=D), requires_grad=False)


def swap_factor(model, bank):
    _, adapter = next(bank.adapters())
    inner = getattr(adapter, "inner", adapter)
    inner._parameters["A"] = nn.Parameter(torch.randn(3, 6, dtype=D))
    inner._parameters["B"] = nn.Parameter(torch.randn(6, 3, dtype=D))


def rescale(model, bank):
    _, adapter = next(bank.adapters())
    getattr(adapter, "inner", adapter).scaling = 7.0


def evaluate(model, bank):
    model.eval()


def weigh(model, bank):
    bank.use(default=-0.5)


def another(model, bank):
    rl.attach(model, rl.LoRA(r=2), "other")
    nudge(bank, "other")
    bank.use("default", "other")


def disable(model, bank):
    bank.use()


def merge(model, bank):
    bank.merge()


def hook(model, bank):
    _, adapter = next(bank.adapters())
    adapter.register_forward_hook(lambda module, args, y: 2 * y)


def freeze(model, bank):
    for _, parameter, _ in bank.trainable():
        parameter.requires_grad_(False)


def train_base(model, bank):
    dict(model.named_parameters())["0.weight"].requires_grad_(True)


def retype(model, bank):
    model.double()
    _, adapter = next(bank.adapters())
    adapter.to(torch.float64)


EDITS = (
    *(swap_weight, write_weight, swap_bias, swap_factor, rescale, evaluate, weigh, another, disable, merge, hook),
    *(freeze, train_base, retype),
)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_every_change_is_noticed(name, edit):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, dtype=D), nn.Tanh(), nn.Linear(6, 6, dtype=D))
    bank = rl.attach(model, METHODS[name])
    nudge(bank)
    x = torch.randn(4, 6, dtype=D, requires_grad=True)
    for _ in range(3):
        model(x).sum().backward()
    assert bank.selector.fused
    edit(model, bank)
    torch.manual_seed(1)
    given = model(x)
    bank.selector.fused = False
    torch.manual_seed(1)
    torch.testing.assert_close(given, model(x), rtol=0, atol=1e-12)


def test_it_is_kept_at_all():
    model = nn.Sequential(nn.Linear(6, 6))
    rl.attach(model, rl.LoRA(r=2))
    model(torch.randn(4, 6))
    memo = model[0].__dict__["_rankloom"].memo
    known = memo.known
    assert known is not None
    model(torch.randn(4, 6))
    assert memo.known is known
    model(torch.randn(4, 6, dtype=torch.float64).float())
    assert memo.known is known
