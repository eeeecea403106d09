"""Names to parts: strings, imported at first use. Registering a method is opting in to the whole contract."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from rankloom.errors import SettingsError, suggest

if TYPE_CHECKING:
    from rankloom.core.plan import Plan

_METHODS: dict[str, str] = {
    "adalora": "rankloom.methods.adalora:AdaLoRA",
    "asymmetric_lora": "rankloom.methods.asymmetric:AsymmetricLoRA",
    "blend": "rankloom.methods.blend:Blend",
    "dora": "rankloom.methods.dora:DoRA",
    "dylora": "rankloom.methods.dylora:DyLoRA",
    "hydralora": "rankloom.presets:hydralora",
    "llava_mole": "rankloom.presets:llava_mole",
    "loftq": "rankloom.presets:loftq",
    "lora": "rankloom.methods.lora:LoRA",
    "lora_flow": "rankloom.presets:lora_flow",
    "lora_fa": "rankloom.presets:lora_fa",
    "loramoe": "rankloom.presets:loramoe",
    "lq_lora": "rankloom.presets:lq_lora",
    "lqer": "rankloom.presets:lqer",
    "mixture": "rankloom.methods.mixture:Mixture",
    "moelora_task": "rankloom.presets:moelora_task",
    "molora": "rankloom.presets:molora",
    "qa_lora": "rankloom.methods.qalora:QALoRA",
    "qdylora": "rankloom.presets:qdylora",
    "qlora": "rankloom.presets:qlora",
    "rslora": "rankloom.presets:rslora",
    "slices": "rankloom.methods.slices:Slices",
    "unrolled_lora": "rankloom.methods.unrolled:UnrolledLoRA",
    "vera": "rankloom.methods.vera:VeRA",
    "xlora": "rankloom.presets:xlora",
}
_GATES: dict[str, str] = {
    "block": "rankloom.gates.block:Block",
    "constant": "rankloom.gates.constant:Constant",
    "first_pass": "rankloom.gates.first_pass:FirstPass",
    "linear": "rankloom.gates.linear:Linear",
    "task": "rankloom.gates.task:Task",
    "topk": "rankloom.gates.topk:TopK",
}
_RULES: dict[str, str] = {
    "balance": "rankloom.rules.balance:Balance",
    "budget": "rankloom.rules.budget:Budget",
    "lora_plus": "rankloom.rules.loraplus:LoRAPlus",
    "orthogonal": "rankloom.rules.orthogonal:Orthogonal",
    "projected_gradient": "rankloom.rules.projection:ProjectedGradient",
    "rank_sampling": "rankloom.rules.sampling:RankSampling",
    "sequence_balance": "rankloom.rules.balance:SequenceBalance",
    "type_balance": "rankloom.rules.balance:TypeBalance",
}
_STARTS: dict[str, str] = {
    "gptq": "rankloom.starts.gptq:GPTQ",
    "loftq": "rankloom.starts.split:LoftQ",
    "lq": "rankloom.starts.split:LQ",
    "lqer": "rankloom.starts.split:LQER",
}
_STORES: dict[str, str] = {
    "block_float": "rankloom.store.blockfloat:BlockFloat",
    "mixed": "rankloom.store.mixed:MixedBits",
    "nested_float": "rankloom.store.nested:NestedFloat",
    "normal_float": "rankloom.store.normalfloat:NormalFloat",
    "uniform": "rankloom.store.uniform:Uniform",
}
_KINDS: dict[str, dict[str, str]] = {
    "gate": _GATES,
    "method": _METHODS,
    "rule": _RULES,
    "start": _STARTS,
    "store": _STORES,
}
GATES: Mapping[str, str] = MappingProxyType(_GATES)
METHODS: Mapping[str, str] = MappingProxyType(_METHODS)
RULES: Mapping[str, str] = MappingProxyType(_RULES)
STARTS: Mapping[str, str] = MappingProxyType(_STARTS)
STORES: Mapping[str, str] = MappingProxyType(_STORES)


def register(name: str, target: str, *, kind: str = "method") -> None:
    """Add a method, gate, rule, start or store (`kind`) of your own: `register("mine", "my_package.mine:Mine")`."""
    if kind not in _KINDS:
        raise SettingsError(f"kind={kind!r}{suggest(kind, _KINDS)}")
    table = _KINDS[kind]
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
    """The registered name of a class of method, gate, rule, start or store."""
    target = f"{cls.__module__}:{cls.__qualname__}"
    return next((name for table in _KINDS.values() for name, t in table.items() if t == target), None)


def class_of(base: type, name: str) -> type | None:
    """The class registered under `name`, if it is a `base`; presets are resolved by `plan_from_data`."""
    for table in _KINDS.values():
        if name in table:
            found = load(table[name])
            if _fits(found, base):
                return cast(type, found)
    known = [n for table in _KINDS.values() for n in table if _fits(load(table[n]), base)]
    what = "store" if base.__name__ == "Keeping" else base.__name__.lower()
    raise SettingsError(f"no {what} {name!r}{suggest(name, known)}")


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
            preset = plan_data(as_plan(found(**settings), {}))
            merged = {**preset, **{k: v for k, v in data.items() if k != "method"}}
            merged["rules"] = [*preset.get("rules", []), *data.get("rules", [])]
            for part in ("store", "start"):
                own, given = preset.get(part), data.get(part)
                if own and isinstance(given, Mapping) and given.get("name") == own["name"]:
                    merged[part] = {**own, **given}
            return plan_from_data(merged, where)
    built: Plan = build(Plan, data, where, class_of)
    return as_plan(built, {})
