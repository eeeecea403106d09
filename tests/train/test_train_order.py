"""One step has one order; rules act in it, and two that fight are refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from train_world import attached, llama, mlp, points, settings, texts

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.core.rule import Rule
from rankloom.errors import SettingsError, StateError
from rankloom.rules.orthogonal import Orthogonal
from rankloom.train.fit import fit
from rankloom.train.optim import factor
from rankloom.train.ruleset import RuleSet
from rankloom.train.settings import TrainSettings

PLAN = Plan(rl.LoRA(r=2))


@dataclass
class Spy(Rule):
    log: list[str] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)

    def groups(self, run: Any, groups: Any) -> Any:
        self.log.append("groups")
        return groups

    def start(self, run: Any) -> None:
        self.log.append(f"start {len(run.optimizer.param_groups)}")

    def before_step(self, run: Any) -> None:
        self.log.append(f"before_step {run.step}")

    def loss(self, run: Any, loss: torch.Tensor) -> torch.Tensor:
        self.log.append("loss")
        return loss

    def after_backward(self, run: Any) -> None:
        self.log.append("after_backward")
        self.seen.append({k: (p.detach().clone(), p.grad.clone()) for k, p, _ in run.bank.trainable()})

    def after_step(self, run: Any) -> None:
        self.log.append(f"after_step {run.step}")
        lr = run.optimizer.param_groups[0]["lr"]
        self.seen.append({k: (p.detach().clone(), p.grad.clone(), lr) for k, p, _ in run.bank.trainable()})

    def finish(self, run: Any) -> None:
        self.log.append(f"finish {run.step}")


def test_the_order_of_a_step() -> None:
    spy = Spy()
    model = attached(mlp, {"default": PLAN}, 1)

    def batches(i: int) -> Any:
        spy.log.append(f"batch {i}")
        return points()[i]

    def loss(m: Any, batch: Any) -> torch.Tensor:
        spy.log.append("forward")
        return ((m(batch[0]) - batch[1]) ** 2).mean()

    chosen = TrainSettings(steps=2, lr=0.1, accumulate=2, clip=1e-3, schedule="constant")
    fit(model, batches, rules=[spy], loss=loss, settings=chosen)
    step = lambda n: [  # noqa: E731
        f"before_step {n}", f"batch {2 * n}", f"batch {2 * n + 1}", "forward", "loss", "forward", "loss",
        "after_backward", f"after_step {n}",
    ]  # fmt: skip
    assert spy.log == ["groups", "start 1", *step(0), *step(1), "finish 2"]
    for before, after in zip(spy.seen[::2], spy.seen[1::2]):
        norm = sum((g**2).sum() for _, g in before.values()) ** 0.5
        clipped = sum((g**2).sum() for _, g, _ in after.values()) ** 0.5
        assert norm > 1e-3, "gradients reach the rules before they are clipped"
        assert clipped == pytest.approx(1e-3, rel=1e-4)
        changed = [not torch.equal(before[k][0], after[k][0]) for k in before]
        assert any(changed), "after_step sees stepped weights"
    assert torch.equal(spy.seen[1]["default/0:B"][0], spy.seen[2]["default/0:B"][0])


def test_rules_come_from_method_plan_and_call_in_that_order() -> None:
    model = attached(mlp, {"a": Plan(rl.AdaLoRA(init_r=2, target_r=1), rules=(rl.LoRAPlus(),))}, 1)
    spy = Spy()
    driver = RuleSet(model.rankloom, [spy])
    assert [type(r).__name__ for r in driver.each] == ["Budget", "Orthogonal", "LoRAPlus", "Spy"]
    assert driver.uses("after_backward")
    assert not RuleSet(model.rankloom, []).uses("finish")


def test_equal_rules_act_once_and_different_ones_are_refused() -> None:
    plan = Plan(rl.AdaLoRA(init_r=4, target_r=2))
    both = attached(mlp, {"a": plan, "b": plan}, 1)
    assert [type(r).__name__ for r in RuleSet(both.rankloom).each] == ["Budget", "Orthogonal"]
    plus = rl.LoRAPlus(ratio=4)
    assert RuleSet(both.rankloom, [plus, plus, rl.LoRAPlus(ratio=4)]).each[-1:] == [plus]
    with pytest.raises(SettingsError, match=r"two rules Orthogonal with different settings.*weight=0.5.*weight=0.1"):
        RuleSet(both.rankloom, [Orthogonal(0.1)])
    other = attached(mlp, {"a": plan, "b": Plan(rl.AdaLoRA(init_r=4, target_r=1))}, 1)
    with pytest.raises(SettingsError, match="two rules Budget"):
        fit(other, points(), steps=2)
    with pytest.raises(SettingsError, match="is no rule"):
        fit(both, points(), steps=2, rules=[rl.LoRAPlus])


def test_groups_that_lose_a_tensor_are_refused() -> None:
    class Careless(Rule):
        def groups(self, run: Any, groups: Any) -> Any:
            return [{**groups[0], "params": groups[0]["params"][1:]}]

    with pytest.raises(SettingsError, match=r"Careless\.groups lost, added or doubled"):
        fit(attached(mlp, {"default": PLAN}, 1), points(), steps=2, rules=[Careless()])


def test_a_rule_that_needs_adapters_says_so() -> None:
    with pytest.raises(StateError, match="has no adapters, and a rule asks for them"):
        fit(mlp(), points(), steps=2, rules=[rl.LoRAPlus()])


def test_the_optimizer_is_not_there_before_its_groups() -> None:
    class Early(Rule):
        def groups(self, run: Any, groups: Any) -> Any:
            run.optimizer.zero_grad()
            return groups

    with pytest.raises(StateError, match="built after `groups`"):
        fit(attached(mlp, {"default": PLAN}, 1), points(), steps=2, rules=[Early()])


def test_lora_plus_keeps_its_ratio_under_the_schedule() -> None:
    rates: list[dict[str, float]] = []

    class Rates(Rule):
        def after_step(self, run: Any) -> None:
            roles = {id(p): role for _, p, role in run.bank.trainable()}
            rates.append({roles[id(p)]: g["lr"] for g in run.optimizer.param_groups for p in g["params"]})

    chosen = TrainSettings(steps=6, lr=0.01, warmup_steps=2)
    fit(attached(mlp, {"default": PLAN}, 1), points(), rules=[rl.LoRAPlus(ratio=8), Rates()], settings=chosen)
    expected = [0.005, 0.01, 0.01, 0.01 * 0.853553, 0.005, 0.01 * 0.146447]
    assert [r["in"] for r in rates] == pytest.approx(expected, rel=1e-5)
    assert [r["out"] for r in rates] == pytest.approx([8 * e for e in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [0.5, 1, 1, 0.75, 0.25]), ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]), ("constant", [0.5, 1, 1, 1, 1])],
)
def test_schedules_by_hand(schedule: Any, expected: list[float]) -> None:
    chosen = TrainSettings(steps=5, warmup_steps=2, schedule=schedule)
    assert [factor(s, chosen) for s in range(5)] == pytest.approx(expected)
    assert TrainSettings(steps=50, warmup_ratio=0.1).warmup == 5


@pytest.mark.parametrize("schedule", [{"tinit": 2, "tfinal": 3, "deltaT": 2}, {"deltaT": 5}, {}])
def test_adalora_ends_with_its_budget(schedule: dict[str, int]) -> None:
    method = rl.AdaLoRA(init_r=4, target_r=2, **schedule)
    model = attached(llama, {"default": Plan(method, target_modules=("o_proj", "up_proj", "q_proj"))}, 1)
    fit(model, texts(), settings=settings())
    living = [int((p != 0).sum()) for _, p, role in model.rankloom.tensors("default") if role == "singular"]
    assert len(living) == 6
    assert sum(living) == 2 * 6


def test_the_first_steps_by_hand() -> None:
    """Two AdamW steps on one number: from 1, loss w², lr 0.1 and weight decay 0.5, warm-up of two steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    chosen = TrainSettings(steps=2, lr=0.1, weight_decay=0.5, warmup_steps=1, schedule="constant", clip=None, eps=1e-12)
    result = fit(model, [torch.ones(1, 1)], loss=lambda m, x: (m(x) ** 2).mean(), settings=chosen)
    first = 1 * (1 - 0.1 * 0.5) - 0.1
    m, v = (0.9 * 0.1 * 2 + 0.1 * 2 * first) / (1 - 0.81), (0.999 * 0.001 * 4 + 0.001 * 4 * first**2) / (1 - 0.999**2)
    assert result.losses == pytest.approx([1.0, first**2])
    assert model.weight.item() == pytest.approx(first * (1 - 0.1 * 0.5) - 0.1 * m / v**0.5, rel=1e-5)
