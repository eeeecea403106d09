"""The closed set of config fields: what each may hold, its default in PEFT, and which values change the function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rankloom.errors import FileError, suggest
from rankloom.formats.patterns import simple

Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Field:
    """`holds` in words, the test of it, and PEFT's default."""

    holds: str
    check: Check
    default: Any = None


@dataclass(frozen=True)
class Start:
    """What a PEFT start means for us: our start of the same kind, and a warning where something is lost."""

    ours: str
    lost: str = ""


def integer(value: Any) -> bool:
    """A JSON integer."""
    return type(value) is int


def number(value: Any) -> bool:
    """A finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def text(value: Any) -> bool:
    """Text."""
    return isinstance(value, str)


def texts(value: Any) -> bool:
    """A list of texts."""
    return isinstance(value, list) and all(map(text, value))


def optional(check: Check) -> Check:
    """null, or what `check` takes."""
    return lambda value: value is None or check(value)


def flag(value: Any) -> bool:
    """true or false."""
    return type(value) is bool


def flags(value: Any) -> bool:
    """A list of true and false."""
    return isinstance(value, list) and all(map(flag, value))


def indices(value: Any) -> bool:
    """A list of non-negative integers."""
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def either(*checks: Check) -> Check:
    """What one of the checks takes."""
    return lambda value: any(check(value) for check in checks)


def mapping(check: Check) -> Check:
    """An object whose values `check` takes."""
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def patterns(check: Check) -> Check:
    """null, or an object from simple regular expressions to what `check` takes."""
    return optional(lambda value: mapping(check)(value) and all(map(simple, value)))


def one_of(*names: Any) -> Check:
    """One of these constants."""
    return lambda value: any(value is n or (isinstance(value, str) and value == n) for n in names)


def ranges(value: Any) -> bool:
    """A list of pairs."""
    return isinstance(value, list) and all(indices(v) and len(v) == 2 for v in value)


def positive(default: int) -> Field:
    """A field for a positive integer."""
    return Field("a positive integer", lambda v: integer(v) and v > 0, default)


FLAG = Field("true or false", flag, False)
NAMES = Field("a list of names, one regular expression, or null", optional(either(text, texts)))
PROBABILITY = Field("a number from 0 up to, not including, 1", lambda v: number(v) and 0 <= v < 1, 0.0)
ALPHA = Field("a number", number, 8)
COUNT = Field("a non-negative integer", lambda v: integer(v) and v >= 0, 0)
FRACTION = Field("a number between 0 and 1", lambda v: number(v) and 0 < v < 1, 0.85)
PATTERN = "an object from names, or regular expressions without nested repeats, to "
BIASES = ("none", "all", "lora_only")

COMMON: Mapping[str, Field] = {
    "peft_type": Field("text", text),
    "target_modules": NAMES,
    "modules_to_save": Field("a list of names or null", optional(texts)),
    "layers_to_transform": Field("block indices or null", optional(either(indices, lambda v: integer(v) and v >= 0))),
    "layers_pattern": NAMES,
    "bias": Field("one of " + ", ".join(BIASES), one_of(*BIASES), "none"),
    "fan_in_fan_out": FLAG,
}
LORA_FAMILY: Mapping[str, Field] = {
    **COMMON,
    "exclude_modules": NAMES,
    "trainable_token_indices": Field(
        "token indices, or an object from embedding names to them", optional(either(indices, mapping(indices)))
    ),
    "layer_replication": Field("a list of [start, end) or null", optional(ranges)),
    "lora_alpha": ALPHA,
    "lora_dropout": PROBABILITY,
}
_TEXT = Field("text or null", optional(text))
_OBJECT = Field("an object or null", optional(lambda value: isinstance(value, dict)))
DESCRIPTIVE: Mapping[str, Field] = {
    "auto_mapping": _OBJECT,
    "base_model_name_or_path": _TEXT,
    "eva_config": _OBJECT,
    "inference_mode": Field("true, false or null", optional(flag)),
    "peft_version": _TEXT,
    "qalora_group_size": Field("an integer or null", optional(integer)),
    "revision": _TEXT,
    "runtime_config": _OBJECT,
    "task_type": _TEXT,
    "unsloth_fixed": Field("true, false or null", optional(flag)),
}
"""Fields that say something about the adapter and nothing about its function."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "corda_config": (None,),
    "ensure_weight_tying": (False, None),
    "kasa_config": (None,),
    "loftq_config": ({}, None),
    "lora_ga_config": (None,),
    "megatron_config": (None,),
    "megatron_core": ("megatron.core", None),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
"""Fields of PEFT that change the function in a way this library has not: only these values are read."""

STARTS: Mapping[Any, Start] = {
    True: Start("kaiming"),
    False: Start("kaiming"),
    "eva": Start("kaiming"),
    "gaussian": Start("gaussian"),
    "mica": Start("kaiming", "PEFT kept B frozen; here both factors train"),
    "orthogonal": Start("kaiming"),
    "pissa": Start("pissa"),
}
"""`init_lora_weights` of files whose tensors, with our start, give PEFT's function."""


def read_fields(
    config: Mapping[str, Any], fields: Mapping[str, Field], where: str, ignore: Collection[str] = ()
) -> dict[str, Any]:
    """The values of `fields` in a config, defaults filled in. Raises `FileError` for a wrong value or a refused field.

    A field that nobody here knows is refused unless it is switched off (null, false, empty) or in `ignore`; those are
    named in one warning.
    """
    schema = {**DESCRIPTIVE, **fields}
    unknown = []
    for key, value in config.items():
        if key in schema:
            if not schema[key].check(value):
                raise FileError(f"{where}: {key}={_shown(value)}: expected {schema[key].holds}")
        elif key in NEUTRAL:
            if not any(value == v and type(value) is type(v) for v in NEUTRAL[key]):
                raise FileError(
                    f"{where}: {key}={_shown(value)} changes what the adapter computes, and Rankloom has no {key}; "
                    "merge the adapter with PEFT, or train without it"
                )
        elif key in ignore or value is None or value is False or value in ("", [], {}):
            unknown.append(key)
        else:
            raise FileError(
                f"{where}: the field {key!r} is unknown, and {_shown(value)} may change what the adapter computes"
                f"{suggest(key, [k for k in schema if k not in config], n=1)}; load(…, ignore=[{key!r}]) reads over it"
            )
    if unknown:
        warnings.warn(f"{where}: unknown fields are left aside: {', '.join(sorted(unknown))}", stacklevel=5)
    return {key: field.default if config.get(key) is None else config[key] for key, field in fields.items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
