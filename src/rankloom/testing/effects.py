"""Every setting of a method has an effect, or says that it has none."""

from __future__ import annotations

import tempfile
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.core.method import Method
from rankloom.core.notes import Notes
from rankloom.errors import SettingsError, TargetError
from rankloom.methods.lora import LoRA
from rankloom.testing.learning import planted_batches
from rankloom.testing.subject import Subject, difference

STEPS = 6
WHAT = ("start", "output", "training", "file")


def settings_matter(subject: Subject) -> None:
    """every setting, changed, changes the start, the output, the training or the file, or is declared inert"""
    method, now = subject.plan.method, _Effects(subject)
    names = [f.name for f in fields(method) if f.init]
    for name in method.inert:
        assert name in names, f"`inert` names {name!r}, which is no setting of {type(method).__name__}"
    hints = typing.get_type_hints(type(method))
    for name in names:
        value = getattr(method, name)
        others = method.examples.get(name) or tuple(_others(hints[name], value, now.site))
        if name in method.inert:
            for other, effects in _tried(subject, name, others):
                found = now.differs(effects)
                assert found is None, f"setting {name!r} is declared inert, and {other!r} changes the {found}"
        else:
            _has_effect(f"{name}={value!r}", now, _tried(subject, name, others))


def _has_effect(setting: str, now: _Effects, tried: Iterator[tuple[Any, _Effects]]) -> None:
    seen = []
    for other, effects in tried:
        try:
            if now.differs(effects) is not None:
                return
        except SettingsError:  # this training refuses the other value: it matters
            return
        seen.append(repr(other))
    assert seen, f"setting {setting}: no other value could be built: give some in `examples`"
    raise AssertionError(
        f"setting {setting}: {' or '.join(seen)} instead changes neither {', '.join(WHAT)}; use it, leave it out, or "
        "declare it in `inert` with the reason"
    )


def _tried(subject: Subject, name: str, others: tuple[Any, ...]) -> Iterator[tuple[Any, _Effects]]:
    """The values of a setting that can be built here, with what they lead to."""
    for other in others:
        try:
            changed = replace(subject, plan=replace(subject.plan, method=replace(subject.plan.method, **{name: other})))
            effects = _Effects(changed)
            assert effects.start
        except (SettingsError, TargetError):
            continue
        yield other, effects


def _others(hint: Any, value: Any, site: str) -> Iterator[Any]:
    """Other values of a type, most telling first; nothing for what only `examples` can tell."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or origin is UnionType:
        for each in args:
            yield from _others(each, value, site)
    elif origin is Literal:
        yield from (each for each in args if each != value)
    elif hint is bool:
        yield not value
    elif hint is int and isinstance(value, int):
        yield from (each for each in dict.fromkeys((2 * value, value + 1, value - 1, value // 2)) if each != value)
    elif hint is float and isinstance(value, (int, float)):
        yield from ((value / 2, 2 * value) if value else (0.3, 2.0))
    elif origin is tuple and args[0] is str:
        yield (site.rpartition(".")[2],)
    elif isinstance(hint, type) and issubclass(hint, Method):
        yield from (each for each in (LoRA(r=3), LoRA(r=2)) if each != value)


@dataclass
class _Effects:
    """What a plan leads to, each part computed when it is first compared."""

    subject: Subject

    @property
    def site(self) -> str:
        """The name of a site."""
        return self.subject.adapted()[1].sites("default")[0].name

    def differs(self, other: _Effects) -> str | None:
        """The first part in which two differ; None: they are the same."""
        return next((part for part in WHAT if self._differ(getattr(self, part), getattr(other, part))), None)

    def _differ(self, one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
        return one.keys() != two.keys() or any(self._unlike(value, two[key]) for key, value in one.items())

    def _unlike(self, one: Any, two: Any) -> bool:
        if not (isinstance(one, Tensor) and isinstance(two, Tensor)):
            return bool(one != two)
        if one.shape != two.shape or not one.numel():
            return one.shape != two.shape
        return difference(one.double(), two.double()) > self.subject.limit(one)

    @cached_property
    def start(self) -> dict[str, Any]:
        """Every tensor of the adapter, and whether it trains."""
        _, bank = self.subject.adapted()
        found = {key: p.detach().clone() for key, p, _ in bank.tensors("default")}
        return found | {f"{key} trains": p.requires_grad for key, p, _ in bank.tensors("default")}

    @cached_property
    def output(self) -> dict[str, Any]:
        """The answers of the model with moved tensors."""
        model, _ = self.subject.nudged()
        return dict(enumerate(self.subject.outputs(model)))  # type: ignore[arg-type]

    @cached_property
    def training(self) -> dict[str, Any]:
        """Losses, tensors and the rules' memory after a few steps."""
        from rankloom.train.ruleset import RuleSet
        from rankloom.train.run import TrainRun

        model, bank = self.subject.adapted()
        parameters = {key: p for key, p, _ in bank.trainable("default")}
        rules = RuleSet(bank)
        run = TrainRun(model, STEPS, parameters, notes=Notes(rules.reads))
        groups = rules.groups(run, [{"params": list(parameters.values()), "lr": self.subject.lr}])
        run.optimizer = torch.optim.Adam(groups)
        batches, losses = planted_batches(self.subject), []
        model.train()
        rules.start(run)
        for run.step in range(STEPS):
            torch.manual_seed(run.step)
            rules.before_step(run)
            batch, wanted = batches[run.step % len(batches)]
            with run.watched(batch, rules.uses("loss")):
                loss = rules.loss(run, F.mse_loss(self.subject.run(model, batch), wanted))
                loss.backward()  # type: ignore[no-untyped-call]
            rules.after_backward(run)
            run.optimizer.step()
            rules.after_step(run)
            run.optimizer.zero_grad()
            losses.append(loss.detach())
        memory = dict(_flat(rules.state(), "rules"))
        rules.finish(run)
        tensors = {key: p.detach() for key, p, _ in bank.tensors("default")}
        return {"losses": torch.stack(losses), **tensors, **memory}

    @cached_property
    def file(self) -> dict[str, Any]:
        """Names and shapes of what is saved."""
        from safetensors import safe_open

        from rankloom.formats import save

        model, _ = self.subject.nudged()
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder, "adapter"), name="default")
            (weights,) = Path(folder, "adapter").glob("*.safetensors")
            with safe_open(weights, "pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested data, but for the settings that rules repeat."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "settings":
                yield from _flat(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _flat(item, f"{path}.{number}")
    else:
        yield path, value
