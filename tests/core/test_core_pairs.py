"""Pairs that cannot go together are refused, with the reason."""

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom.errors import NotMergeable, RankloomError, SettingsError
from rankloom.rules.budget import Budget
from rankloom.rules.projection import ProjectedGradient


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("method", "overrides", "error", "reason"),
    [
        (rl.DoRA(rl.hydralora(r=2)), {}, NotMergeable, "no single matrix"),
        (rl.VeRA(r=4), {"rank_pattern": {"2": 2}}, SettingsError, "share one pair of rank 4"),
        (rl.VeRA(r=4), {"alpha_pattern": {"2": 2.0}}, SettingsError, "no setting 'lora_alpha'"),
        (rl.AdaLoRA(), {"rank_pattern": {"2": 2}}, SettingsError, "no setting 'r'"),
    ],
    ids=["dora(hydralora)", "vera with ranks", "vera with alphas", "adalora with ranks"],
)
def test_refused_at_attach_and_nothing_is_touched(method, overrides, error, reason):
    model = net()
    before = [type(m) for m in model.modules()]
    with pytest.raises(error, match=reason):
        rl.attach(model, method, **overrides)
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "rankloom")


@pytest.mark.parametrize(
    ("method", "rules", "reason"),
    [
        (rl.VeRA(r=4), [ProjectedGradient()], "frozen A"),
        (rl.AdaLoRA(init_r=4, target_r=2), [ProjectedGradient()], "frozen A"),
        (rl.DyLoRA(r=4), [Budget(target_r=2)], "SVD form"),
        (rl.AdaLoRA(init_r=4, target_r=2), [Budget(target_r=3)], "Budget"),
        (rl.LoRA(r=4), [rl.LoRAPlus(ratio=2.0), rl.LoRAPlus(ratio=4.0)], "LoRAPlus"),
    ],
    ids=["projection of vera", "projection of adalora", "budget of dylora", "two budgets", "two ratios"],
)
def test_refused_by_the_first_step(method, rules, reason):
    model = net()
    rl.attach(model, method)
    batches = [(torch.randn(4, 8), torch.randn(4, 4))]
    with pytest.raises(RankloomError, match=reason):
        rl.fit(model, batches, steps=3, lr=1e-3, rules=rules)
