"""A training that knows nothing of rules is told which ones it leaves out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor

from rankloom.core.bank import Bank
from rankloom.core.plan import Plan
from rankloom.core.rule import Rule

DRIVEN = ("start", "rate", "before_step", "loss", "after_backward", "after_step", "finish")
"""Hooks that only a driver calls; `groups` alone needs the optimizer and nobody else."""


@dataclass
class Watch:
    """Hears each gradient of one tensor; warns once if it was stepped since the last and nobody drives the rules.

    The tensor's sum tells: fused optimizers leave its version as it is.
    """

    bank: Bank
    name: str
    rules: tuple[str, ...]
    before: float | None = None
    told: bool = False

    def __call__(self, parameter: Tensor) -> None:
        """After a backward pass."""
        if self.told or self.bank.driven:
            return
        now = float(parameter.detach().float().sum())
        stepped, self.before = self.before not in (None, now), now
        if stepped:
            self.told = True
            warnings.warn(
                f"adapter {self.name!r} is trained without its rules {', '.join(self.rules)}: nobody calls them. Train "
                "with rankloom.fit, or give a Trainer the optimizer of rankloom.hf.trainer.optimizer_for and "
                "RankloomCallback()",
                stacklevel=2,
            )


def watch(bank: Bank, name: str, plan: Plan) -> None:
    """Watch a tensor of the adapter if its plan has rules that somebody must drive."""
    rules = tuple(type(r).__name__ for r in (*plan.method.rules(), *plan.rules) if _needs_driver(r))
    first = next((p for _, p, _ in bank.trainable(name) if p.is_leaf and p.requires_grad), None)
    if rules and first is not None:
        first.register_post_accumulate_grad_hook(Watch(bank, name, rules))  # type: ignore[no-untyped-call]


def _needs_driver(rule: Rule) -> bool:
    return any(getattr(type(rule), hook) is not getattr(Rule, hook) for hook in DRIVEN)
