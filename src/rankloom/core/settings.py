"""Frozen dataclasses to plain data and back: strict keys, checked types, near matches in every refusal."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from rankloom.errors import SettingsError, suggest


def to_data(value: Any, name_of: Callable[[type], str | None]) -> Any:
    """JSON-ready form. Defaults are left out; an object of a registered class becomes {"name": …, settings}."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data: dict[str, Any] = {}
        registered = name_of(type(value))
        if registered is not None:
            data["name"] = registered
        for f in dataclasses.fields(value):
            if not f.init:
                continue
            item = getattr(value, f.name)
            if not _is_default(f, item):
                data[f.name] = to_data(item, name_of)
        return data
    if isinstance(value, Mapping):
        return {str(k): to_data(v, name_of) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_data(v, name_of) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(to_data(v, name_of) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    registered = name_of(type(value))
    if registered is not None:
        return {"name": registered, **{k: to_data(v, name_of) for k, v in vars(value).items() if not k.startswith("_")}}
    raise SettingsError(f"a {type(value).__name__} cannot be written as JSON")


def build(cls: type, data: Any, where: str, class_of: Callable[[type, str], type | None]) -> Any:
    """An instance of the dataclass `cls` from a mapping; `class_of(base, name)` resolves registered names."""
    if not isinstance(data, Mapping):
        raise SettingsError(f"{where}: expected a mapping of settings for {cls.__name__}, got {data!r}")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    for key in data:
        if key not in known:
            raise SettingsError(f"{where}: {cls.__name__} has no setting {key!r}{suggest(str(key), known)}")
    values = {k: _value(hints[k], v, f"{where}.{k}", class_of) for k, v in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise SettingsError(f"{where}: {error}") from error


def _is_default(f: dataclasses.Field[Any], item: Any) -> bool:
    if f.default is not dataclasses.MISSING:
        return bool(type(item) is type(f.default) and item == f.default)
    if f.default_factory is not dataclasses.MISSING:
        return bool(item == f.default_factory())
    return False


def _value(hint: Any, data: Any, where: str, class_of: Callable[[type, str], type | None]) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin is typing.Union or origin is types.UnionType:
        return _first_fit(args, data, where, class_of)
    if origin is typing.Literal:
        if data not in args:
            raise SettingsError(f"{where}: {data!r} is not one of {', '.join(map(repr, args))}{_near(data, args)}")
        return data
    if origin in (tuple, list) or hint in (tuple, list):
        if isinstance(data, str) or not isinstance(data, (list, tuple)):
            raise SettingsError(f"{where}: expected a list, got {data!r}")
        return _sequence(origin or hint, args, data, where, class_of)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise SettingsError(f"{where}: expected a mapping, got {data!r}")
        return {k: _value(args[1], v, f"{where}.{k}", class_of) for k, v in data.items()}
    if hint is type(None) or hint is None:
        if data is not None:
            raise SettingsError(f"{where}: expected null, got {data!r}")
        return None
    return _scalar_or_object(hint, data, where, class_of)


def _sequence(kind: type, args: tuple[Any, ...], data: Any, where: str, class_of: Any) -> Any:
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(data):
            raise SettingsError(f"{where}: expected {len(args)} values, got {data!r}")
        return tuple(_value(a, v, f"{where}[{i}]", class_of) for i, (a, v) in enumerate(zip(args, data)))
    item = args[0] if args else Any
    return kind(_value(item, v, f"{where}[{i}]", class_of) for i, v in enumerate(data))


def _first_fit(args: tuple[Any, ...], data: Any, where: str, class_of: Any) -> Any:
    refusals = []
    exact = [a for a in args if isinstance(a, type) and type(data) is a]
    for option in exact + [a for a in args if a not in exact]:
        try:
            return _value(option, data, where, class_of)
        except SettingsError as error:
            refusals.append(error)
    raise max(refusals, key=lambda e: len(str(e)))


def _scalar_or_object(hint: Any, data: Any, where: str, class_of: Any) -> Any:
    if hint is bool and isinstance(data, bool):
        return data
    if hint is int and isinstance(data, int) and not isinstance(data, bool):
        return data
    if hint is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if hint is str and isinstance(data, str):
        return data
    if hint in (bool, int, float, str):
        raise SettingsError(f"{where}: expected {hint.__name__}, got {data!r}")
    if isinstance(data, hint):
        return data
    if isinstance(data, str):
        data = {"name": data}
    if isinstance(data, Mapping) and "name" in data:
        cls = class_of(hint, str(data["name"]))
        if cls is not None:
            return build(cls, {k: v for k, v in data.items() if k != "name"}, f"{where}({data['name']})", class_of)
    if dataclasses.is_dataclass(hint):
        return build(hint, data, where, class_of)  # type: ignore[arg-type]
    raise SettingsError(f"{where}: expected {hint.__name__}, got {data!r}")


def _near(data: Any, args: tuple[Any, ...]) -> str:
    return suggest(data, [a for a in args if isinstance(a, str)]) if isinstance(data, str) else ""
