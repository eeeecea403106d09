"""Settings: dataclasses whose type hints are kept, whether they are constructed, read from a file or given as flags.

A setting's hint decides what it takes: scalars strictly (no text for a number, no truth value for a count, finite
numbers only), lists for tuples, and for another part of settings an object, a mapping or a registered name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar

from rankloom import registry
from rankloom.errors import SettingsError, suggest
from rankloom.settings import values
from rankloom.settings.values import Reader, join, meant, refusal, shown

DEEPEST = 32
"""Parts inside parts."""
REQUIRED = type("Required", (), {})()
"""The default of a setting that has to be given."""


class Settings:
    """Base of every dataclass of settings: what its fields' hints do not take is refused when it is constructed.

    Whole numbers for floats, lists and sets become what the hint says. `__post_init__` of a subclass runs after that.
    `short`: the setting that a bare text stands for.
    """

    short: ClassVar[str | None] = None

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            @functools.wraps(own)
            def checked(self: Any) -> None:
                _check(self)
                own(self)

            setattr(cls, "__post_init__", checked)  # noqa: B010 - mypy refuses to assign to a method

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def spelled(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """`data` with what stands for something else spelled out; for a subclass to override."""
        return data


@dataclass(frozen=True)
class Setting:
    """One setting of a class of settings, or of a function that makes one."""

    name: str
    hint: Any
    default: Any = REQUIRED

    def read(self, value: Any, where: str) -> Any:
        """The value as it is kept. Raises `SettingsError` that says what to write."""
        reader = reader_of(self.hint)
        try:
            return reader.read(value, where)
        except SettingsError as error:
            if error.path != where or error.advised:
                raise
            raise refusal(where, value, reader.words, self._advice(value, reader)) from None

    def _advice(self, value: Any, reader: Reader) -> str:
        near = suggest(value, reader.known, all_of_few=False) if isinstance(value, str) else ""
        if near:
            return near
        for other in meant(value):
            try:
                reader.read(other, "")
            except SettingsError:
                continue
            return f"; write {self.name}={shown(other)}"
        return "" if self.default in (None, REQUIRED) else f", as in {self.name}={shown(self.default)}"


class UnknownSetting(SettingsError):
    """`key`, given as `value`, is no setting of the part at `where`."""

    def __init__(self, where: str, name: str, key: Any, value: Any, known: typing.Iterable[str]) -> None:
        said = f"{where or 'the configuration'}: {name} has no setting {shown(key)}{suggest(str(key), known)}"
        super().__init__(said, join(where, str(key)), advised=True)
        self.key = str(key)
        self.value = value


def from_data(cls: Any, data: Any, where: str = "") -> Any:
    """What the hint `cls`, mostly a class of settings, takes of plain data (as JSON and YAML hold); `where`: its path.

    Raises `SettingsError` that knows the path of the setting.
    """
    return reader_of(cls).read(data, where)


def to_data(value: Any, *, full: bool = False) -> Any:
    """Plain data that `from_data` takes; an object of a registered class is {"name": …, its settings}.

    Settings at their defaults are left out unless `full`.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_data(item, full=full) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_data(item, full=full) for item in value]
    name, known = registry.name_of(type(value)), settings_of(type(value))
    if name is None and (registry.kind_of(type(value)) or not known):
        said = f"{type(value).__name__} has no name to be written by"
        raise SettingsError(f"{said}: register it, as in rankloom.register('mine', 'package.module:Mine')")
    given = [(s, getattr(value, s.name)) for s in known]
    kept = {s.name: to_data(v, full=full) for s, v in given if full or type(v) is not type(s.default) or v != s.default}
    return kept if name is None else {"name": name, **kept}


def build(target: Any, data: Any, where: str, base: type | None = None) -> Any:
    """What the class, or the function that makes a `base`, makes of a mapping of its settings."""
    name = target.__name__
    if not isinstance(data, Mapping):
        raise refusal(where or name, data, f"a mapping of settings of {name}")
    if hasattr(target, "spelled"):
        data = target.spelled(data, where)
    known = {s.name: s for s in settings_of(target, base)}
    for key in data:
        if key not in known:
            raise UnknownSetting(where, name, key, data[key], known)
    for s in known.values():
        if s.default is REQUIRED and s.name not in data:
            said = f"{where or name}: {s.name} is missing: {reader_of(s.hint).words}"
            raise SettingsError(said, where, advised=True)
    given = {key: known[key].read(value, join(where, key)) for key, value in data.items()}
    try:
        return target(**given)
    except SettingsError as error:
        named = re.match(r"(?:\w+[.(])?(\w+)=", str(error))
        leaf = named[1] if named is not None and named[1] in known else ""
        raise SettingsError(f"{where}: {error}" if where else str(error), join(where, leaf), advised=True) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise SettingsError(f"{where or name}: {error}", where, advised=True) from error


def settings_of(target: Any, base: type | None = None) -> tuple[Setting, ...]:
    """The settings of a dataclass; of a function its parameters and, if it takes more, those of the `base` it makes."""
    found: tuple[Setting, ...] = _settings_of(target, base)
    return found


@functools.cache
def _settings_of(target: Any, base: Any) -> tuple[Setting, ...]:
    try:
        hints = typing.get_type_hints(target, include_extras=True)
    except NameError as error:
        place = f"{target.__module__}.{target.__qualname__}"
        raise SettingsError(f"{place}: {error} in a type hint: import it in that module, when it runs") from error
    if isinstance(target, type):
        fields = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()
        return tuple(Setting(f.name, hints[f.name], _default(f)) for f in fields if f.init)
    parameters = inspect.signature(target).parameters.values()
    found = {
        p.name: Setting(p.name, hints[p.name], REQUIRED if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is not p.VAR_KEYWORD
    }
    if base is not None and len(found) < len(parameters):
        part = part_in(target(), base)
        rest = settings_of(type(part))
        found = {**{s.name: dataclasses.replace(s, default=getattr(part, s.name)) for s in rest}, **found}
    return tuple(found.values())


def part_in(made: Any, base: type) -> Any:
    """The `base` in what a function made: that itself, or one of its settings."""
    if isinstance(made, base):
        return made
    return next(part for s in settings_of(type(made)) if isinstance(part := getattr(made, s.name), base))


def part_of(hint: Any) -> type | None:
    """The class of settings, or of registered parts, that a hint asks for; None for a plain value."""
    if isinstance(hint, type):
        return hint if issubclass(hint, Settings) or registry.kind_of(hint) else None
    inner = typing.get_args(hint) if _is_union(hint) else ()
    return next((part for part in map(part_of, inner) if part is not None), None)


def takes_mapping(hint: Any) -> bool:
    """Whether a hint takes mappings with any keys."""
    inner = typing.get_args(hint) if _is_union(hint) else ()
    return typing.get_origin(hint) in (Mapping, dict) or any(map(takes_mapping, inner))


@functools.cache
def reader_of(hint: Any) -> Reader:
    """How a hint is read."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in values.SCALARS:
        return values.SCALARS[hint]
    if origin is None:
        return _part(hint) if part_of(hint) else values.instance(hint)
    generic = _GENERIC.get(origin)
    return values.instance(origin) if generic is None else generic(*inner)


def _each(make: Callable[..., Reader]) -> Callable[..., Reader]:
    return lambda *inner: make(*map(reader_of, inner))


def _tuple(*inner: Any) -> Reader:
    repeated = inner[-1:] == (Ellipsis,)
    items = inner[:1] if repeated else inner
    held = {inner[0], *typing.get_args(inner[0])}
    lone = next((kind for kind in (int, str) if repeated and kind in held), None)
    return values.sequence(*map(reader_of, items), repeated=repeated, lone=lone)


_GENERIC: Mapping[Any, Callable[..., Reader]] = {
    typing.Union: _each(values.union),
    types.UnionType: _each(values.union),
    typing.Literal: values.literal,
    typing.Annotated: lambda hint, *notes: values.bounded(reader_of(hint), *filter(callable, notes)),
    tuple: _tuple,
    Mapping: _each(values.mapping),
    dict: _each(values.mapping),
}


def _part(base: type) -> Reader:
    """A part of settings: an object, a mapping, or the text that stands for one."""
    kind = registry.kind_of(base)
    short = "name" if kind else getattr(base, "short", None)
    words = f"a {kind}, by name or as {{name: …, settings}}" if kind else f"settings of {base.__name__}"

    def read(value: Any, where: str) -> Any:
        if isinstance(value, base):
            return value
        if isinstance(value, str) and short:
            value = {short: value}
        if not isinstance(value, Mapping) or where.count(".") > DEEPEST:
            raise refusal(where, value, words)
        if kind is None:
            return build(base, value, where)
        named = dict(value)
        target = maker_of(base, named.pop("name", None), where)
        made = build(target, named, where, base)
        if not isinstance(made, base):
            said = f"{where}: {value['name']!r} is a whole {type(made).__name__}, no {kind}"
            raise SettingsError(said, where, advised=True)
        return made

    return Reader(words, read)


def maker_of(base: type, name: Any, where: str = "") -> Any:
    """The class or function registered under `name` that makes a `base`."""
    kind = registry.kind_of(base)
    if not isinstance(name, str):
        raise refusal(join(where, "name"), name, f"the name of a {kind}", suggest("", registry.names(base)))
    try:
        return registry.class_of(base, name)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}" if where else str(error), where, advised=True) from None


def _check(made: Any) -> None:
    cls: Any = type(made)
    for s, where, read in _checks(cls):
        value = getattr(made, s.name)
        try:
            kept = read(value, where)
        except SettingsError:
            kept = s.read(value, where)
        if kept is not value:
            object.__setattr__(made, s.name, kept)


@functools.cache
def _checks(cls: Any) -> tuple[tuple[Setting, str, Callable[[Any, str], Any]], ...]:
    return tuple((s, f"{cls.__name__}.{s.name}", reader_of(s.hint).read) for s in settings_of(cls))


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not MISSING:
        return f.default_factory()
    return REQUIRED if f.default is MISSING else f.default


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
