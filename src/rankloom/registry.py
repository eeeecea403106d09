"""Names to parts: strings, imported at first use. Registering a method is opting in to the whole contract."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rankloom.errors import SettingsError, suggest

if TYPE_CHECKING:
    from rankloom.core.plan import Plan

_METHODS: dict[str, str] = {
    "adalora": "rankloom.methods.adalora:AdaLoRA",
    "asymmetric_lora": "rankloom.methods.asymmetric:AsymmetricLoRA",
    "dora": "rankloom.methods.dora:DoRA",
    "dylora": "rankloom.methods.dylora:DyLoRA",
    "hydralora": "rankloom.methods.hydralora:HydraLoRA",
    "lora": "rankloom.methods.lora:LoRA",
    "lora_fa": "rankloom.presets:lora_fa",
    "qa_lora": "rankloom.methods.qalora:QALoRA",
    "rslora": "rankloom.presets:rslora",
    "slices": "rankloom.methods.slices:Slices",
    "unrolled_lora": "rankloom.methods.unrolled:UnrolledLoRA",
    "vera": "rankloom.methods.vera:VeRA",
}
_RULES: dict[str, str] = {
    "budget": "rankloom.rules.budget:Budget",
    "lora_plus": "rankloom.rules.loraplus:LoRAPlus",
    "orthogonal": "rankloom.rules.orthogonal:Orthogonal",
    "projected_gradient": "rankloom.rules.projection:ProjectedGradient",
    "rank_sampling": "rankloom.rules.sampling:RankSampling",
}
METHODS: Mapping[str, str] = MappingProxyType(_METHODS)
RULES: Mapping[str, str] = MappingProxyType(_RULES)


def register(name: str, target: str, *, kind: str = "method") -> None:
    """Add a method or rule of your own: `register("mine", "my_package.mine:Mine")`."""
    table = {"method": _METHODS, "rule": _RULES}[kind]
    if name in table and table[name] != target:
        raise SettingsError(f"{kind} {name!r} is already {table[name]!r}")
    table[name] = target


def load(target: str) -> Any:
    """The object behind ``"module:attribute"``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def maker(name: str) -> Any:
    """The class or preset of the method `name`."""
    if name not in METHODS:
        raise SettingsError(f"no method {name!r}{suggest(name, METHODS)}")
    return load(METHODS[name])


def default_plan(name: str, **settings: Any) -> Plan:
    """The plan of a registered method or preset, with its settings changed."""
    from rankloom.core.attach import as_plan

    return as_plan(maker(name)(**settings), {})


def name_of(cls: type) -> str | None:
    """The registered name of a class of method or rule."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for table in (_METHODS, _RULES) for name, t in table.items() if t == target), None)


def class_of(base: type, name: str) -> type | None:
    """The class registered under `name`, if it is a `base`; presets are resolved by `plan_from_data`."""
    tables: Iterable[Mapping[str, str]] = (_METHODS, _RULES)
    for table in tables:
        if name in table:
            found = load(table[name])
            if isinstance(found, type) and issubclass(found, base):
                return found
    known = [n for table in (_METHODS, _RULES) for n in table if _fits(load(table[n]), base)]
    raise SettingsError(f"no {base.__name__.lower()} {name!r}{suggest(name, known)}")


def _fits(found: Any, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-ready data; settings at their defaults are left out."""
    from rankloom.core.settings import to_data

    data: dict[str, Any] = to_data(plan, name_of)
    return data


def plan_from_data(data: Mapping[str, Any], where: str = "plan") -> Plan:
    """A plan from JSON data: strict keys, near matches. A preset's name works as a method's."""
    from rankloom.core.attach import as_plan
    from rankloom.core.plan import Plan
    from rankloom.core.settings import build

    data = dict(data)
    method = data.get("method")
    method = {"name": method} if isinstance(method, str) else method
    if isinstance(method, Mapping) and method.get("name") in METHODS:
        found = load(METHODS[str(method["name"])])
        if not isinstance(found, type):
            settings = {k: v for k, v in method.items() if k != "name"}
            preset = as_plan(found(**settings), {})
            merged = {**plan_data(preset), **{k: v for k, v in data.items() if k != "method"}}
            merged["rules"] = [*plan_data(preset).get("rules", []), *data.get("rules", [])]
            return plan_from_data(merged, where)
    built: Plan = build(Plan, data, where, class_of)
    return as_plan(built, {})
