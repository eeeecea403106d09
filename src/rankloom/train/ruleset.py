"""The rules of a run as one: every hook in one place and one order, for each driver of a training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from rankloom.core.bank import Bank
from rankloom.core.rule import Rule, Run
from rankloom.errors import SettingsError, StateError, suggest


class RuleSet:
    """All rules of a run, in order: each trained adapter's method and plan, then those that were passed.

    A driver calls, in this order: `groups` → `start` (→ `restore`) → [ `before_step` → `rate` → forward → `loss` →
    backward → `after_backward` → clip → optimizer step → `after_step` → zero_grad ] for each step → `finish`.
    """

    def __init__(self, bank: Bank | None, rules: Iterable[Rule] = ()) -> None:
        """Raises `SettingsError` where two rules of one class differ: they would fight over the same tensors."""
        self.bank = bank
        self.each: list[Rule] = []
        for origin, rule in _found(bank, rules):
            if not isinstance(rule, Rule):
                raise SettingsError(
                    f"{origin}: {rule!r} is no rule; pass an instance such as rankloom.LoRAPlus(ratio=16)"
                )
            self._add(origin, rule)

    def _add(self, origin: str, rule: Rule) -> None:
        for other in self.each:
            if other is rule or _alike(other, rule):
                return
            if type(other) is type(rule):
                raise SettingsError(
                    f"two rules {type(rule).__name__} with different settings in one run: {other!r} and, from "
                    f"{origin}, {rule!r}; they would change the same tensors twice: keep one"
                )
        self.each.append(rule)

    def uses(self, hook: str) -> bool:
        """True if some rule does something at this hook."""
        return any(getattr(type(rule), hook) is not getattr(Rule, hook) for rule in self.each)

    def changes_loss(self, rule: Rule) -> bool:
        """Whether this rule does something to the loss."""
        return type(rule).loss is not Rule.loss

    def groups(self, run: Run, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups after every rule; none may lose or double a tensor."""
        wanted = sorted(id(p) for g in groups for p in g["params"])
        for rule in self.each:
            groups = rule.groups(run, groups)
            if sorted(id(p) for g in groups for p in g["params"]) != wanted:
                raise SettingsError(f"{type(rule).__name__}.groups lost, added or doubled a tensor of the optimizer")
        return groups

    def start(self, run: Run) -> None:
        """Before the first step; the optimizer exists."""
        self._drive(True)
        for rule in self.each:
            rule.start(run)

    def before_step(self, run: Run) -> None:
        """Before the first forward of a step."""
        for rule in self.each:
            rule.before_step(run)

    @property
    def reads(self) -> frozenset[str]:
        """Kinds of notes that some rule looks at."""
        return frozenset(kind for rule in self.each for kind in rule.reads)

    def rate(self, run: Run) -> float:
        """What all rules together multiply the learning rate of the coming step by. Refuses a negative or no number."""
        factor = 1.0
        for rule in self.each:
            one = float(rule.rate(run))
            if not 0 <= one < math.inf:
                raise SettingsError(f"{type(rule).__name__}.rate gave {one} at step {run.step}: a number from 0 on")
            factor *= one
        return factor

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """The loss of one batch with every penalty added."""
        for rule in self.each:
            loss = rule.loss(run, loss)
        return loss

    def after_backward(self, run: Run) -> None:
        """Gradients are complete, unscaled and not yet clipped."""
        for rule in self.each:
            rule.after_backward(run)

    def after_step(self, run: Run) -> None:
        """Weights are stepped, gradients still there."""
        for rule in self.each:
            rule.after_step(run)

    def finish(self, run: Run) -> None:
        """After the last step."""
        for rule in self.each:
            rule.finish(run)
        self._drive(False)

    def _drive(self, driven: bool) -> None:
        if self.bank is not None:
            self.bank.driven = driven

    def state(self) -> list[dict[str, Any]]:
        """Every rule's memory, in order."""
        return [{"rule": type(r).__name__, "settings": _plain(r), "state": r.state()} for r in self.each]

    def check(self, state: list[dict[str, Any]]) -> None:
        """Raises `StateError` where the memories are those of other rules."""
        saved, mine = [s["rule"] for s in state], [type(rule).__name__ for rule in self.each]
        if saved != mine:
            odd = next((name for name in saved + mine if saved.count(name) != mine.count(name)), "their order")
            raise StateError(
                f"the checkpoint was made with the rules {saved or 'none'}, this run has {mine or 'none'}: "
                f"{odd!r} differs{suggest(odd, mine) if odd in saved else ''}; pass the same rules in the same order"
            )
        for rule, one in zip(self.each, state):
            if _plain(rule) != one["settings"]:
                raise StateError(
                    f"the checkpoint was made with {type(rule).__name__}({one['settings']}), this run has "
                    f"{rule!r}: pass the same settings"
                )

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Take the memories back; after `start`. Raises `StateError` where the rules are others."""
        self.check(state)
        for rule, one in zip(self.each, state):
            rule.restore(one["state"])


def _found(bank: Bank | None, rules: Iterable[Rule]) -> Iterator[tuple[str, Rule]]:
    for name in bank.trained if bank is not None else ():
        assert bank is not None
        plan = bank.plans[name]
        for rule in (*plan.method.rules(), *plan.rules):
            yield f"adapter {name!r}", rule
    for rule in rules:
        yield "rules=", rule


def _alike(one: Rule, other: Rule) -> bool:
    """True for two rules of one class with the same settings; a rule that declares none is like no other."""
    if type(one) is not type(other) or not dataclasses.is_dataclass(one):
        return False
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one) if f.init]
    return all(a is b or (_is_plain(a) and a == b) for a, b in pairs)


def _plain(rule: Rule) -> dict[str, Any]:
    """The settings of a rule that are plain values."""
    if not dataclasses.is_dataclass(rule):
        return {}
    found = {f.name: getattr(rule, f.name) for f in dataclasses.fields(rule) if f.init}
    return {name: value for name, value in found.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
