"""The folder for what PEFT has not: the same files, our own `peft_type`, the plan as data, tensors by bank keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rankloom.core.method import Method
from rankloom.core.plan import Plan, plan_data, plan_from_data
from rankloom.core.targets import pattern_key
from rankloom.errors import FileError
from rankloom.formats.base import base_name
from rankloom.formats.entry import Entry, plain
from rankloom.formats.manifest import Source
from rankloom.formats.patterns import check_expressions, exactly, fault
from rankloom.formats.peft.targets import our_targets
from rankloom.formats.view import View

PEFT_TYPE = "RANKLOOM"
VERSION = 1
KEYS = frozenset({"base_model_name_or_path", "format", "journal", "peft_type", "plan"})


class Native:
    """`RANKLOOM`: any adapter of the bank, tensor for tensor."""

    peft_type = PEFT_TYPE

    def config(self, view: View) -> dict[str, Any]:
        """adapter_config.json."""
        config = {"peft_type": PEFT_TYPE, "format": VERSION, "plan": plan_data(portable(view))}
        name = base_name(view.model)
        return dict(sorted({**config, **({"base_model_name_or_path": name} if name else {})}.items()))

    def entries(self, view: View) -> list[Entry]:
        """Parameters and kept buffers of every adapter as "site:path", shared tensors as "shared:key"."""
        found = [
            plain(f"{site.name}:{path}", tensor)
            for site in view.sites
            for path, tensor in site.adapter.state_dict(keep_vars=True).items()
        ]
        return [*found, *(plain(f"shared:{key}", tensor) for key, tensor in _shared(view))]

    def notes(self, view: View) -> list[str]:
        """Nothing is said otherwise than in the plan."""
        return []

    def plans(self, source: Source, model: nn.Module) -> tuple[Plan, Plan]:
        """The plan in the config, twice."""
        unknown = sorted(source.config.keys() - KEYS)
        if unknown:
            raise FileError(f"{source.config_file}: {unknown[0]!r} is no field of a Rankloom adapter")
        if source.config.get("format") != VERSION:
            raise FileError(
                f"{source.config_file}: format {source.config.get('format')!r}; this Rankloom reads {VERSION}: "
                "upgrade it"
            )
        plan = plan_from_data(_object(source), source.config_file)
        check_patterns(plan, source.config_file)
        return plan, plan

    def prepare(self, view: View, source: Source) -> None:
        """Give adapters the ranks that the file has."""
        for site in view.sites:
            start = f"{site.name}:"
            said = {k.removeprefix(start): tuple(h.shape) for k, h in source.header.items() if k.startswith(start)}
            site.adapter.fit_to(said)

    def entries_in(self, view: View, source: Source) -> list[Entry]:
        """Every tensor that the file must have."""
        return self.entries(view)


def portable(view: View) -> Plan:
    """The plan with every regular expression that a reader would not run replaced by the names it matches here."""
    plan = view.plan
    changes: dict[str, Any] = {}
    wordings = [v for v in (plan.target_modules, plan.exclude_modules) if isinstance(v, str)]
    if fault(wordings):
        modules, _ = our_targets(view)
        changes |= {"target_modules": tuple(sorted(modules)), "exclude_modules": (), "layers_to_transform": None}
        changes["layers_pattern"] = None
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(plan, field)
        if fault(patterns):
            names = [site.name for site, _ in view.adapted]
            hits = {name: key for name in names if (key := pattern_key(patterns, name)) is not None}
            changes[field] = {exactly(name): patterns[key] for name, key in hits.items()}
    return dataclasses.replace(plan, **changes)


def check_patterns(plan: Plan, where: str) -> None:
    """Refuse a plan from a file whose regular expressions are not run."""
    for field in ("target_modules", "exclude_modules", "target_parameters"):
        said = getattr(plan, field)
        check_expressions(field, [said] if isinstance(said, str) else (), where)
    layers = plan.layers_pattern or ()
    check_expressions("layers_pattern", [layers] if isinstance(layers, str) else layers, where, searched=True)
    for field in ("rank_pattern", "alpha_pattern"):
        check_expressions(field, getattr(plan, field), where)


def _object(source: Source) -> dict[str, Any]:
    plan = source.config.get("plan")
    if not isinstance(plan, dict):
        raise FileError(f"{source.config_file}: 'plan' is {plan!r}; it must be an object")
    return plan


def _shared(view: View) -> Iterator[tuple[str, Tensor]]:
    shared = view.shared
    keep = _keeps_bases(view.plan.method)
    for key, tensor in shared.named_parameters():
        if keep or shared.roles[key] != "basis":
            yield key, tensor


def _keeps_bases(method: Method) -> bool:
    """False when a method of the plan makes its frozen shared tensors again from a key (`save_projection=False`)."""
    return bool(getattr(method, "save_projection", True)) and all(map(_keeps_bases, method.inner_methods()))
