"""What settings there are, from the dataclasses themselves: types in words, defaults, what docstrings say of each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from rankloom import registry
from rankloom.errors import SettingsError, suggest
from rankloom.settings.changes import NAME, spots
from rankloom.settings.engine import REQUIRED, Setting, Settings, part_of, reader_of, settings_of, to_data

_SAID = re.compile(r"(?:^|\n|[;.:] )((?:`\w+`(?:, | and )?)+):? ?")
"""The names that a passage of a docstring begins with: "`r`: the rank; `beta1`, `beta2`: of the mean"."""


@dataclass(frozen=True)
class Field(Settings):
    """One setting: its name or path, what it takes, its default as data (None also where it must be given), its doc."""

    name: str
    type: str
    default: Any
    doc: str


def describe(target: Any, base: type | None = None) -> list[Field]:
    """The settings of a class, or of a function that makes a `base`."""
    return [_field(s, s.name, target) for s in settings_of(target, base)]


def reference(cls: type, data: Mapping[str, Any] | None = None) -> list[Field]:
    """The settings of a class and of the parts that `data` (or the defaults) choose, by dotted path."""
    found = [spot for spot in spots(cls, data or {}) if spot.setting is not NAME]
    fields = [(spot, _field(spot.setting, ".".join(spot.path), spot.owner)) for spot in found]
    return [
        field if spot.part is None else replace(field, default=spot.data.get("name"))
        for spot, field in fields
        if spot.part is None or registry.kind_of(spot.part)
    ]


def find(fields: list[Field], key: str) -> list[Field]:
    """Those at a path, below it, or whose path ends in it. Raises `SettingsError` with near names for none."""
    found = [f for f in fields if f.name == key or f.name.startswith(f"{key}.") or f.name.endswith(f".{key}")]
    if not found:
        leaves = {name for f in fields for name in (f.name, f.name.rpartition(".")[2])}
        raise SettingsError(f"there is no setting {key!r}{suggest(key, leaves)}")
    return found


def _field(s: Setting, name: str, owner: Any) -> Field:
    part = part_of(s.hint)
    names = registry.names(part) if part is not None else []
    words = f"{reader_of(s.hint).words} ({', '.join(names)})" if names else reader_of(s.hint).words
    return Field(name, words, None if s.default is REQUIRED else to_data(s.default), _docs(owner).get(s.name, ""))


def _docs(owner: Any) -> dict[str, str]:
    """{setting: what the docstring says of it}."""
    text = re.sub(r"\s*\n(?!- |\n)\s*", " ", inspect.getdoc(owner) or "").replace("\n- ", "\n")
    starts = list(_SAID.finditer(text))
    ends = [*(m.start() for m in starts[1:]), len(text)]
    found: dict[str, str] = {}
    for start, end in zip(starts, ends):
        said = text[start.end() : end].split("\n")[0].strip(" .;")
        found |= {name: said for name in re.findall(r"`(\w+)`", start[1]) if name not in found}
    return found
