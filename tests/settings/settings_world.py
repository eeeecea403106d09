"""Values of every kind of hint, for properties that hold for all settings."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping

from hypothesis import strategies as st

from rankloom import registry
from rankloom.settings import Where, Within
from rankloom.settings.engine import REQUIRED, settings_of

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)
SMALL = 300
"""Generated ranks and counts stay small: they are settings here, and some are built."""
PARTS = [
    (kind, name)
    for kind, table in (
        ("method", registry.METHODS),
        ("rule", registry.RULES),
        ("start", registry.STARTS),
        ("store", registry.STORES),
    )
    for name in table
]


def value(hint, depth=0):
    """A strategy for data that a hint takes."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [note for note in inner[1:] if isinstance(note, (Within, Where))]
        found = (
            number(inner[0], next((b for b in bounds if isinstance(b, Within)), Within()))
            if inner[0] in (int, float)
            else value(inner[0], depth)
        )
        if any(isinstance(b, Where) for b in bounds) and inner[0] is int:
            found = st.sampled_from((2, 3, 4, 8))
        return found.filter(lambda v: all(b(v) for b in bounds))
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(value(option, depth) for option in inner))
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return st.lists(value(inner[0], depth), max_size=3)
        return st.tuples(*(value(item, depth) for item in inner)).map(list)
    if origin is not None and issubclass(origin, Mapping):
        return st.dictionaries(TEXT, value(inner[1], depth), max_size=3)
    if hint in (int, float):
        return number(hint, Within())
    plain = {bool: st.booleans(), str: TEXT, type(None): st.none(), None: st.none()}
    if hint in plain:
        return plain[hint]
    if registry.kind_of(hint) and depth < 2:
        return st.sampled_from(registry.names(hint)).flatmap(lambda name: part(hint, name, depth + 1))
    return (
        data_of(hint, depth + 1) if dataclasses.is_dataclass(hint) and not registry.kind_of(hint) else st.just("lora")
    )


def number(kind, bounds):
    least = -SMALL if bounds.least is None else bounds.least
    most = least + SMALL if bounds.most is None else min(bounds.most, least + SMALL)
    if kind is int:
        return st.integers(int(least), int(most))
    return st.floats(least, most, exclude_min=bounds.open_below, exclude_max=bounds.open_above)


def data_of(target, depth=0, base=None):
    """A strategy for mappings of some of the settings of a class or function."""
    known = settings_of(target, base)
    must = {s.name: value(s.hint, depth) for s in known if s.default is REQUIRED}
    return st.fixed_dictionaries(
        must, optional={s.name: value(s.hint, depth) for s in known if s.default is not REQUIRED}
    )


def part(base, name, depth=0):
    """A strategy for the data of a registered part."""
    made = registry.class_of(base, name)
    return data_of(made, depth, base).map(lambda data: {**data, "name": name})


GARBAGE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from(
        [object(), int, 1j, 10**400, float("nan"), "lora", "dora", "normal_float", "lora_plus", "name", "r"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.sampled_from(["name", "method", "inner", "r", "store", "bits", "rules"])
            | st.text(max_size=4)
            | st.integers()
            | st.none(),
            inner,
            max_size=3,
        )
        | st.frozensets(st.integers(), max_size=2)
    ),
    max_leaves=8,
)
