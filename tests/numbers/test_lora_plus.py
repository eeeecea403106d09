"""LoRA+ (arXiv 2402.12354): a higher rate for the out factors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from number_tools import Net, linear, only, stage
from torch import nn

import peft
import rankloom as rl
from rankloom.errors import SettingsError


def _mixed() -> Net:
    return Net(fc=nn.Linear(6, 5), table=nn.Embedding(6, 4), head=nn.Linear(5, 2))


def _groups(model: nn.Module, rule: rl.LoRAPlus, **group):
    bank = model.rankloom
    start = [{"params": [p for _, p, _ in bank.trainable()], "lr": 1e-3, "weight_decay": 0.1, **group}]
    return rule.groups(stage(model), start)


def test_every_tensor_is_in_one_group():
    """Must hold: every trainable tensor in exactly one group; rates exact by role; no decay on 1-d tensors."""
    model = _mixed()
    bank = rl.attach(
        model, rl.DoRA(rl.LoRA(r=2)), target_modules=["fc", "table"], modules_to_save=("head",), bias="lora_only"
    )
    groups = _groups(model, rl.LoRAPlus(ratio=16.0))
    found = [id(p) for g in groups for p in g["params"]]
    assert sorted(found) == sorted(id(p) for _, p, _ in bank.trainable())
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for key, p, role in bank.trainable():
        if "/table:" in key and p.ndim > 1:
            want = (1e-6, 0.1)
        elif p.ndim < 2:
            want = (1.6e-2, 0.0)
        else:
            want = (1.6e-2 if role == "out" else 1e-3, 0.1)
        assert rate[id(p)] == pytest.approx(want), key


def test_peft_agrees():
    """Oracle: PEFT's optimizer gives every tensor the same rate and decay; the head's weight counts as in, its bias as out."""
    from peft.optimizers import create_loraplus_optimizer

    base = _mixed()
    config = peft.LoraConfig(r=2, target_modules=["fc", "table"], modules_to_save=["head"])
    wrapped = peft.get_peft_model(copy.deepcopy(base), config)
    theirs = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    rl.attach(base, rl.LoRA(r=2), target_modules=["fc", "table"], modules_to_save=("head",))
    ours = _groups(base, rl.LoRAPlus(ratio=16.0))

    def shape_rates(groups):
        return sorted((tuple(p.shape), g["lr"], g["weight_decay"]) for g in groups for p in g["params"])

    for mine, other in zip(shape_rates(ours), shape_rates(theirs.param_groups), strict=True):
        assert mine[0] == other[0]
        assert mine[1:] == pytest.approx(other[1:])


def test_ratio_one_is_the_plain_optimizer():
    """Must hold: ratio 1 equals the plain optimizer bitwise."""
    ends = []
    for rule in (None, rl.LoRAPlus(ratio=1.0)):
        torch.manual_seed(0)
        model = linear()
        bank = rl.attach(model, rl.LoRA(r=2))
        groups = [{"params": [p for _, p, _ in bank.trainable()], "lr": 0.01, "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups if rule is None else rule.groups(stage(model), groups))
        x = torch.randn(4, 6).double()
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        ends.append([p.detach().clone() for _, p, _ in bank.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_ratio_is_kept_under_a_scheduler():
    """Must hold: group rates are exact and kept under schedulers."""
    model = linear()
    rl.attach(model, rl.LoRA(r=2))
    optimizer = torch.optim.AdamW(_groups(model, rl.LoRAPlus(ratio=8.0)))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    for _ in range(15):
        low, high = sorted(g["lr"] for g in optimizer.param_groups)
        assert high / low == pytest.approx(8.0)
        optimizer.step()
        scheduler.step()
    assert low < 0.9e-3


def test_frozen_a_is_accepted():
    """Must hold: with A frozen its group is empty and left out."""
    model = linear()
    bank = rl.attach(model, rl.LoRA(r=2, frozen="A"))
    (group,) = _groups(model, rl.LoRAPlus(ratio=4.0))
    assert group["params"] == [only(bank).B]
    assert group["lr"] == 4e-3


def _imbalance(n: int, ratio: float) -> float:
    """|change of the features by A's step| over |change by B's step|, after a first step, for y = B A x at width n."""
    torch.manual_seed(n)
    model = linear(n, n, bias=False, dtype=torch.float32)
    with torch.no_grad():
        model.fc.weight.zero_()
    bank = rl.attach(model, rl.LoRA(r=1, lora_alpha=1))
    adapter = only(bank)
    with torch.no_grad():
        adapter.A.normal_(std=1 / math.sqrt(n))
    x, target = torch.sign(torch.randn(1, n)), torch.ones(1, n)
    group = {"params": [adapter.A, adapter.B], "lr": 0.1 / ratio}
    optimizer = torch.optim.Adam(rl.LoRAPlus(ratio=ratio).groups(stage(model), [group]), eps=1e-12)
    for _ in range(2):
        a, b = adapter.A.detach().clone(), adapter.B.detach().clone()
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    by_b = (adapter.B.detach() - b) @ (a @ x.T)
    by_a = b @ ((adapter.A.detach() - a) @ x.T)
    return (by_a.norm() / by_b.norm()).item()


def test_width():
    """Must hold: under Adam, with one rate for both, A's step overtakes B's like n; a ratio that grows like n keeps them even."""
    widths = (64, 256, 1024, 4096)

    def slope(values):
        return math.log(values[-1] / values[0]) / math.log(widths[-1] / widths[0])

    fixed = [_imbalance(n, 1.0) for n in widths]
    grown = [_imbalance(n, n / 64) for n in widths]
    assert slope(fixed) == pytest.approx(1.0, abs=0.25)
    assert slope(grown) == pytest.approx(0.0, abs=0.25)


@pytest.mark.parametrize("ratio", [0.0, -2.0])
def test_ratio_is_positive(ratio):
    """Refused by name."""
    with pytest.raises(SettingsError, match="ratio"):
        rl.LoRAPlus(ratio=ratio)


def test_magnitudes_of_embeddings_train_as_any_other():
    """The learning rate of embeddings is for factors: a DoRA magnitude on an embedding takes lr·ratio, as in PEFT."""
    from peft.optimizers import create_loraplus_optimizer

    def make():
        torch.manual_seed(0)
        return nn.ModuleDict({"emb": nn.Embedding(7, 4), "lin": nn.Linear(4, 3)})

    model = make()
    bank = rl.attach(model, rl.DoRA(rl.LoRA(r=2)), target_modules=["emb", "lin"])
    ours = {id(p): g for g in _groups(model, rl.LoRAPlus(ratio=8)) for p in g["params"]}
    wrapped = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["emb", "lin"], use_dora=True))
    optimizer = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_lr_embedding=1e-6, loraplus_weight_decay=0.1
    )
    theirs = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    named = {n: theirs[id(p)] for n, p in wrapped.named_parameters() if p.requires_grad}
    for site, name in ((s, s.name) for s in bank.sites("default")):
        (rate,) = {lr for n, lr in named.items() if f".{name}." in n and "magnitude" in n}
        assert ours[id(site.adapter.magnitude)]["lr"] == pytest.approx(rate)
