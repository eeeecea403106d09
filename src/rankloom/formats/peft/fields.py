"""The closed set of config fields: what each may hold, its default in PEFT, and which values change the function."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from rankloom.errors import FileError, SettingsError, one_line, suggest
from rankloom.formats.patterns import fault
from rankloom.settings import NotNegative, Probability, Where, Within, from_data
from rankloom.settings.values import shown


@dataclass(frozen=True)
class Field:
    """What a field takes, as the type hint of a setting, and PEFT's default."""

    hint: Any
    default: Any = None


@dataclass(frozen=True)
class Start:
    """What a PEFT start means for us: our start of the same kind, and a warning where something is lost."""

    ours: str
    lost: str = ""


Whole = Annotated[int, Within(1)]
Index = Annotated[int, Within(0)]
Names = str | tuple[str, ...] | None
SIMPLE = Where("{}, with names or short regular expressions", lambda value: not fault(value))
EMPTY = Where("an empty object", lambda value: not value)

FLAG = Field(bool, False)
NAMES = Field(Names)
LIST = Field(tuple[str, ...] | None)
PROBABILITY = Field(Probability, 0.0)
ALPHA = Field(float, 8)
COUNT = Field(Index, 0)
FRACTION = Field(Annotated[float, Within(0, 1, open_below=True, open_above=True)], 0.85)
WEIGHT = Field(NotNegative, 0.5)
OFF = Field(Literal[False], False)


def positive(default: int) -> Field:
    """A field for a positive integer."""
    return Field(Whole, default)


COMMON: Mapping[str, Field] = {
    "peft_type": Field(str),
    "target_modules": NAMES,
    "modules_to_save": LIST,
    "layers_to_transform": Field(tuple[Index, ...] | None),
    "layers_pattern": NAMES,
    "bias": Field(Literal["none", "all", "lora_only"], "none"),
    "fan_in_fan_out": FLAG,
}
LORA_FAMILY: Mapping[str, Field] = {
    **COMMON,
    "exclude_modules": NAMES,
    "trainable_token_indices": Field(tuple[Index, ...] | Mapping[str, tuple[Index, ...]] | None),
    "layer_replication": Field(tuple[tuple[Index, Index], ...] | None),
    "lora_alpha": ALPHA,
    "lora_dropout": PROBABILITY,
}
TEXT = Field(str | None)
OBJECT = Field(Mapping[str, Any] | None)
DESCRIPTIVE: Mapping[str, Field] = {
    "auto_mapping": OBJECT,
    "base_model_name_or_path": TEXT,
    "eva_config": OBJECT,
    "inference_mode": Field(bool | None),
    "peft_version": TEXT,
    "qalora_group_size": Field(int | None),
    "revision": TEXT,
    "runtime_config": OBJECT,
    "task_type": TEXT,
    "unsloth_fixed": Field(bool | None),
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
            try:
                from_data(schema[key].hint, value, key)
            except SettingsError as error:
                raise FileError(f"{where}: {error}") from error
        elif key in NEUTRAL:
            if not any(value == v and type(value) is type(v) for v in NEUTRAL[key]):
                raise FileError(
                    f"{where}: {key}={shown(value)} changes what the adapter computes, and Rankloom has no {key}; "
                    "merge the adapter with PEFT, or train without it"
                )
        elif key in ignore or value is None or value is False or value in ("", [], {}):
            unknown.append(key)
        else:
            raise FileError(
                f"{where}: the field {key!r} is unknown, and {shown(value)} may change what the adapter computes"
                f"{suggest(key, [k for k in schema if k not in config], n=1)}; load(…, ignore=[{key!r}]) reads over it"
            )
    if unknown:
        names = one_line(", ".join(sorted(unknown)))
        warnings.warn(f"{where}: unknown fields are left aside: {names}", stacklevel=6)
    return {key: field.default if config.get(key) is None else config[key] for key, field in fields.items()}
