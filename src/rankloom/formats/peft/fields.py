"""The closed set of config fields: what each may hold, its default in PEFT, and which values change the function."""

from __future__ import annotations

import re
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
    """What a field takes, as the type hint of a setting, and PEFT's default, which null means too."""

    hint: Any
    default: Any = None


@dataclass(frozen=True)
class Start:
    """What a PEFT start means for us: our start of the same kind, and a warning where something is lost."""

    ours: str
    lost: str = ""


Whole = Annotated[int, Within(1)]
Index = Annotated[int, Within(0)]
Names = str | tuple[str, ...]
SIMPLE = Where("{}, with names or short regular expressions", lambda value: not fault(value))
EMPTY = Where("nothing", lambda value: not value)

FLAG = Field(bool, False)
NAMES = Field(Names)
LIST = Field(tuple[str, ...])
PROBABILITY = Field(Probability, 0.0)
ALPHA = Field(float, 8)
COUNT = Field(Index, 0)
FRACTION = Field(Annotated[float, Within(0, 1, open_below=True, open_above=True)], 0.85)
WEIGHT = Field(NotNegative, 0.5)
OFF = Field(Literal[False], False)


def positive(default: int) -> Field:
    """A field for a positive integer."""
    return Field(Whole, default)


TARGETED: Mapping[str, Field] = {
    "peft_type": Field(str),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "modules_to_save": LIST,
    "layers_to_transform": Field(tuple[Index, ...]),
    "layers_pattern": NAMES,
}
COMMON: Mapping[str, Field] = {
    **TARGETED,
    "bias": Field(Literal["none", "all", "lora_only"], "none"),
    "fan_in_fan_out": FLAG,
}
LORA_FAMILY: Mapping[str, Field] = {
    **COMMON,
    "ensure_weight_tying": FLAG,
    "trainable_token_indices": Field(tuple[Index, ...] | Mapping[str, tuple[Index, ...]]),
    "layer_replication": Field(tuple[tuple[Index, Index], ...]),
    "lora_alpha": ALPHA,
    "lora_dropout": PROBABILITY,
}
TEXT = Field(str)
OBJECT = Field(Mapping[str, Any])
DESCRIPTIVE: Mapping[str, Field] = {
    "auto_mapping": OBJECT,
    "base_model_name_or_path": TEXT,
    "corda_config": OBJECT,
    "eva_config": OBJECT,
    "inference_mode": Field(bool),
    "loftq_config": OBJECT,
    "lora_ga_config": OBJECT,
    "peft_version": TEXT,
    "qalora_group_size": Field(int),
    "revision": TEXT,
    "runtime_config": OBJECT,
    "task_type": TEXT,
    "unsloth_fixed": Field(bool),
}
"""Fields that say something about the adapter and nothing about its function: how it was made, and for what. A start
that rewrites the base is named by init_lora_weights, not by its config."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "megatron_config": ({},),
    "megatron_core": ("megatron.core",),
    "monteclora_config": (),
    "use_bdlora": (False,),
    "use_qalora": (False,),
    "velora_config": (),
}
"""Fields of PEFT that change the function in a way this library has not: only null and these values are read. An empty
config is no null: PEFT fills it with defaults, which act."""

STARTS: Mapping[Any, Start] = {
    True: Start("kaiming"),
    False: Start("kaiming"),
    "eva": Start("kaiming"),
    "gaussian": Start("gaussian"),
    "mica": Start("kaiming", "PEFT kept B frozen; here both factors train"),
    "olora": Start("olora"),
    "orthogonal": Start("kaiming"),
    "pissa": Start("pissa"),
}
"""`init_lora_weights` of files whose tensors, with our start, give PEFT's function."""

FAST = re.compile(r"pissa_niter_\d+")
SKETCHED = Start("pissa", "PEFT drew a random sketch of the base's largest directions; the exact ones are near it")
CONVERT = (
    "rewrites the base model when PEFT loads it; save it in PEFT with path_initial_model_for_weight_conversion, which "
    "makes it a plain LoRA"
)
LOST: Mapping[str, str] = {
    "corda": CONVERT,
    "loftq": "quantises the base anew when PEFT loads it; save the base that it trained on (PEFT's get_base_model()), "
    "load that one and say init_lora_weights=true in the config",
    "lora_ga": CONVERT,
}
"""Starts that cannot be made again from the file, and what to do instead."""


def start_of(said: bool | str, where: str) -> Start:
    """The start of a config. Raises `FileError` for one that cannot be made again, or that nobody knows."""
    key = said.lower() if isinstance(said, str) else said
    if isinstance(key, str) and FAST.fullmatch(key):
        return SKETCHED
    if key in STARTS:
        return STARTS[key]
    known = [name for name in (*STARTS, *LOST) if isinstance(name, str)]
    reason = LOST.get(str(key), f"is no start of a LORA{suggest(str(said), known)}")
    raise FileError(f"{where}: init_lora_weights={said!r} {reason}")


def read_fields(
    config: Mapping[str, Any], fields: Mapping[str, Field], where: str, ignore: Collection[str] = ()
) -> dict[str, Any]:
    """The values of `fields` in a config, defaults filled in. Raises `FileError` for a wrong value or a refused field.

    Null is the default of every field. A field that nobody here knows is refused unless it is switched off (false,
    empty) or in `ignore`; those are named in one warning.
    """
    schema = {**DESCRIPTIVE, **fields}
    unknown = []
    for key, value in config.items():
        if key in schema:
            _check_value(key, value, schema[key], where)
        elif key in NEUTRAL:
            if value is not None and not any(value == v and type(value) is type(v) for v in NEUTRAL[key]):
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
    return filled(config, fields)


def filled(config: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The values of `fields`, with the defaults of those that are left out or null."""
    return {key: field.default if config.get(key) is None else config[key] for key, field in fields.items()}


def _check_value(key: str, value: Any, field: Field, where: str) -> None:
    if value is None:
        return
    if isinstance(value, str) and field.hint == LIST.hint:  # a word would do in a setting of ours, not in PEFT's list
        raise FileError(f"{where}: {key}={value!r}: expected a list")
    try:
        from_data(field.hint, value, key)
    except SettingsError as error:
        raise FileError(f"{where}: {error}") from error
