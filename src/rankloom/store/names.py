"""Stores by name: the settings of a store as plain data, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from rankloom.errors import SettingsError, suggest
from rankloom.store.base import Store
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

STORES: dict[str, type[Store]] = {
    "block_float": BlockFloat,
    "nested_float": NestedFloat,
    "normal_float": NormalFloat,
    "uniform": Uniform,
}


def store_data(store: Store) -> dict[str, Any]:
    """{"name": …, every setting}: JSON-ready. Raises `SettingsError` for a store that has no name here."""
    for name, cls in STORES.items():
        if type(store) is cls:
            return {"name": name, **dataclasses.asdict(store)}
    raise SettingsError(f"{type(store).__name__} has no name in rankloom.store.names.STORES: add it there first")


def store_from_data(data: Any, where: str = "store") -> Store:
    """A store from its name alone, or from a mapping as `store_data` gives it; strict keys and types."""
    data = {"name": data} if isinstance(data, str) else data
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise SettingsError(f"{where}: expected a store such as 'normal_float' or {{'name': 'uniform', 'bits': 3}}")
    cls = STORES.get(data["name"])
    if cls is None:
        raise SettingsError(f"{where}: no store {data['name']!r}{suggest(data['name'], STORES)}")
    settings = {key: value for key, value in data.items() if key != "name"}
    hints = typing.get_type_hints(cls)
    for key, value in settings.items():
        if key not in hints:
            raise SettingsError(f"{where}: {data['name']} has no setting {key!r}{suggest(str(key), hints)}")
        _check(hints[key], value, f"{where}.{key}")
    return cls(**settings)


def _check(hint: Any, value: Any, where: str) -> None:
    if typing.get_origin(hint) is typing.Literal:
        if value not in typing.get_args(hint):
            raise SettingsError(f"{where}: {value!r} is not one of {', '.join(map(repr, typing.get_args(hint)))}")
    elif type(value) is not hint:
        raise SettingsError(f"{where}: expected {hint.__name__}, got {value!r}")
