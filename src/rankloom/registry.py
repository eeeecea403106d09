"""Names to parts: strings, imported at first use. Registering a method is opting in to the whole contract."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rankloom.errors import SettingsError, suggest

_METHODS: dict[str, str] = {
    "adalora": "rankloom.methods.adalora:AdaLoRA",
    "asymmetric_lora": "rankloom.methods.asymmetric:AsymmetricLoRA",
    "bilora": "rankloom.methods.bilora:BiLoRA",
    "blend": "rankloom.methods.blend:Blend",
    "dora": "rankloom.methods.dora:DoRA",
    "dylora": "rankloom.methods.dylora:DyLoRA",
    "hira": "rankloom.methods.hira:HiRA",
    "hydralora": "rankloom.presets:hydralora",
    "ia3": "rankloom.methods.ia3:IA3",
    "llava_mole": "rankloom.presets:llava_mole",
    "loftq": "rankloom.presets:loftq",
    "loha": "rankloom.methods.loha:LoHa",
    "lokr": "rankloom.methods.lokr:LoKr",
    "lora": "rankloom.methods.lora:LoRA",
    "lora_fa": "rankloom.presets:lora_fa",
    "lora_flow": "rankloom.presets:lora_flow",
    "loramoe": "rankloom.presets:loramoe",
    "lq_lora": "rankloom.presets:lq_lora",
    "lqer": "rankloom.presets:lqer",
    "melora": "rankloom.methods.melora:MELoRA",
    "mixture": "rankloom.methods.mixture:Mixture",
    "moelora_task": "rankloom.presets:moelora_task",
    "molora": "rankloom.presets:molora",
    "mov": "rankloom.methods.mov:MoV",
    "nola": "rankloom.methods.nola:NOLA",
    "qa_lora": "rankloom.methods.qalora:QALoRA",
    "qdylora": "rankloom.presets:qdylora",
    "qlora": "rankloom.presets:qlora",
    "relora": "rankloom.presets:relora",
    "rslora": "rankloom.presets:rslora",
    "slices": "rankloom.methods.slices:Slices",
    "tied_lora": "rankloom.methods.tied:TiedLoRA",
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
    "bilevel": "rankloom.rules.bilevel:Bilevel",
    "budget": "rankloom.rules.budget:Budget",
    "lora_plus": "rankloom.rules.loraplus:LoRAPlus",
    "orthogonal": "rankloom.rules.orthogonal:Orthogonal",
    "projected_gradient": "rankloom.rules.projection:ProjectedGradient",
    "rank_sampling": "rankloom.rules.sampling:RankSampling",
    "relora": "rankloom.rules.relora:ReLoRA",
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
_COMPOSERS: dict[str, str] = {
    "lorahub": "rankloom.compose.lorahub:LoRAHub",
}
_OBJECTIVES: dict[str, str] = {
    "distillation": "rankloom.objectives.distillation:Distillation",
    "dpo": "rankloom.objectives.preference:DPO",
    "gradient_ascent": "rankloom.objectives.forgetting:GradientAscent",
    "inverted_hinge": "rankloom.objectives.forgetting:InvertedHinge",
    "kto": "rankloom.objectives.preference:KTO",
    "npo": "rankloom.objectives.forgetting:NPO",
    "orpo": "rankloom.objectives.preference:ORPO",
    "sft": "rankloom.objectives.sft:SFT",
    "simpo": "rankloom.objectives.preference:SimPO",
}
_KINDS: dict[str, dict[str, str]] = {
    "composer": _COMPOSERS,
    "gate": _GATES,
    "method": _METHODS,
    "objective": _OBJECTIVES,
    "rule": _RULES,
    "start": _STARTS,
    "store": _STORES,
}
_BASES: dict[str, str] = {
    "composer": "rankloom.compose.composer:Composer",
    "gate": "rankloom.core.gate:Gate",
    "method": "rankloom.core.method:Method",
    "objective": "rankloom.objectives.base:Objective",
    "rule": "rankloom.core.rule:Rule",
    "start": "rankloom.core.start:Start",
    "store": "rankloom.store.base:Keeping",
}
"""Kind of part → the class that all parts of this kind are."""
COMPOSERS: Mapping[str, str] = MappingProxyType(_COMPOSERS)
GATES: Mapping[str, str] = MappingProxyType(_GATES)
METHODS: Mapping[str, str] = MappingProxyType(_METHODS)
OBJECTIVES: Mapping[str, str] = MappingProxyType(_OBJECTIVES)
RULES: Mapping[str, str] = MappingProxyType(_RULES)
STARTS: Mapping[str, str] = MappingProxyType(_STARTS)
STORES: Mapping[str, str] = MappingProxyType(_STORES)


def register(name: str, target: str, *, kind: str = "method") -> None:
    """Add a part of your own, a method or another `kind`: `register("mine", "my_package.mine:Mine")`."""
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


def objective(name: str, **settings: Any) -> Any:
    """The objective `name` with its settings: `objective("npo", beta=0.2)`."""
    if name not in OBJECTIVES:
        raise SettingsError(f"no objective {name!r}{suggest(name, OBJECTIVES)}")
    return load(OBJECTIVES[name])(**settings)


def kinds_with(name: str) -> dict[str, tuple[type, Any]]:
    """{kind: (the class that all its parts are, what is registered)} for each kind with a part of that name."""
    return {kind: (load(_BASES[kind]), load(table[name])) for kind, table in _KINDS.items() if name in table}


def kind_of(cls: type) -> str | None:
    """The kind of part that a class is: the one whose base class it is, or derives from."""
    ancestors = {_target(base) for base in cls.__mro__}
    return next((kind for kind, base in _BASES.items() if base in ancestors), None)


def names(cls: type) -> list[str]:
    """The registered names of the parts that are a `cls`, which may be a kind's base class or one below it."""
    kind = kind_of(cls) or ""
    table = _KINDS.get(kind, {})
    return sorted(name for name in table if _BASES[kind] == _target(cls) or _makes(load(table[name]), cls))


def name_of(cls: type) -> str | None:
    """The registered name of a class."""
    target = _target(cls)
    return next((name for table in _KINDS.values() for name, t in table.items() if t == target), None)


def class_of(base: type, name: str) -> Any:
    """The class registered under `name` that is a `base`, or the preset: a function that makes one."""
    table = _KINDS.get(kind_of(base) or "", {})
    if name in table and _makes(found := load(table[name]), base):
        return found
    raise SettingsError(f"no {kind_of(base)} {name!r}{suggest(name, names(base))}")


def _makes(made: Any, base: type) -> bool:
    return not isinstance(made, type) or issubclass(made, base)


def _target(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
