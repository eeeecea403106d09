"""Which modules a PEFT config means, by PEFT's own rule, and a config that means exactly ours."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from rankloom.core.site import LAYER
from rankloom.core.targets import matches
from rankloom.formats.patterns import alternatives
from rankloom.formats.view import View, attention_of

Config = Mapping[str, Any]


def selected(config: Config, names: Iterable[str]) -> set[str]:
    """The module names that PEFT adapts: target, minus excluded and saved ones, in the wanted blocks."""
    return {name for name in names if _selects(config, name)}


def selected_parameters(targets: Iterable[str], names: Iterable[str]) -> set[str]:
    """The parameter names that PEFT adapts: whole name or dotted suffix."""
    wanted = list(targets)
    return {name for name in names if matches(wanted, name)}


def target_fields(view: View, known: Container[str], *, expressions: bool) -> dict[str, Any]:
    """Target fields with which PEFT adapts exactly the places of `view`.

    `known`: the fields that there are; `expressions`: whether PEFT takes an expression at its word here. The plan's own
    wording if PEFT reads it the same way, else the shortest of: last names, full names, one expression.
    """
    modules, parameters = our_targets(view)
    found: dict[str, Any] = {"target_modules": []}
    if modules:
        every = [c for c in _candidates(view, modules) if all(k in known for k, v in c.items() if v is not None)]
        tries = every if expressions else [c for c in every if not isinstance(c["target_modules"], str)]
        found = next(c for c in tries if selected(c, view.modules) == modules)
    if parameters:
        wording = sorted(view.plan.target_parameters)
        same = selected_parameters(wording, all_parameters(view)) == parameters
        found["target_parameters"] = wording if same else sorted(parameters)
    return {k: v for k, v in found.items() if k != "modules_to_save"}


def our_targets(view: View) -> tuple[set[str], set[str]]:
    """The modules and the bare parameters that a view adapts; an attention's own weights count as its module."""
    modules: set[str] = set()
    parameters: set[str] = set()
    for site, _ in view.adapted:
        attention = attention_of(site, view.modules)
        if attention is not None:
            modules.add(attention)
        elif site.slot == LAYER:
            modules.add(site.path)
        else:
            parameters.add(site.name)
    return modules, parameters


def ends_with(endings: Iterable[str], names: Iterable[str]) -> set[str]:
    """The modules that PEFT saves whole: every name with such an ending, dot or no dot; inner ones of these aside."""
    hit = {name for name in names if any(name.endswith(e) for e in endings)}
    return {name for name in hit if not any(name.startswith(f"{other}.") for other in hit)}


def saved_wording(view: View) -> list[str] | None:
    """modules_to_save in words by which PEFT saves exactly ours; None if there are none."""
    hit = {name for name in view.modules if matches(view.plan.modules_to_save, name)}
    ours = {name for name in hit if not any(name.startswith(f"{other}.") for other in hit)}
    tries = (sorted(view.plan.modules_to_save), sorted(ours))
    return next((words for words in tries if ends_with(words, view.modules) == ours), None)


def all_parameters(view: View) -> list[str]:
    """Names of the base's parameters."""
    return [f"{path}.{key}" if path else key for path, module in view.modules.items() for key in module._parameters]


def _candidates(view: View, modules: set[str]) -> Iterable[dict[str, Any]]:
    plan = view.plan
    saved = {"modules_to_save": saved_wording(view)}
    if plan.target_modules != "all-linear" and not plan.sites:
        layers = list(plan.layers_to_transform) if plan.layers_to_transform is not None else None
        yield {
            **saved,
            "target_modules": _listed(plan.target_modules),
            "exclude_modules": _listed(plan.exclude_modules) or None,
            "layers_to_transform": layers,
            "layers_pattern": _listed(plan.layers_pattern) if plan.layers_pattern else None,
        }
    yield {**saved, "target_modules": sorted({m.rsplit(".", 1)[-1] for m in modules})}
    yield {**saved, "target_modules": sorted(modules)}
    yield {**saved, "target_modules": alternatives(sorted(modules))}


def blocks(value: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """One block index or a list of them, as a tuple; None where PEFT keeps all blocks, as it does for an empty list."""
    if isinstance(value, int):
        return (value,)
    return tuple(value) if value else None


def _listed(value: Any) -> Any:
    return value if isinstance(value, str) else sorted(value)


def _selects(config: Config, name: str) -> bool:
    target, excluded = config["target_modules"], config.get("exclude_modules")
    if excluded and matches(excluded, name):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in config.get("modules_to_save") or ()):
        return False
    layers = blocks(config.get("layers_to_transform"))
    if isinstance(target, str):
        return layers is None and matches(target, name)
    if name in target:
        return True
    if not matches(target, name):
        return False
    return layers is None or _block(name, config.get("layers_pattern")) in layers


def _block(name: str, layers_pattern: Any) -> int | None:
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    tries = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    hit = next((m for t in tries if (m := re.match(t, name))), None)
    return int(hit[1]) if hit else None
