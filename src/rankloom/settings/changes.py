"""Changes `key=value` to the data of nested settings, by the full path of a setting or by the end of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rankloom import registry
from rankloom.errors import SettingsError, suggest
from rankloom.settings import yamltext
from rankloom.settings.engine import REQUIRED, Setting, Settings, maker_of, part_of, settings_of, takes_mapping, to_data

Path = tuple[str, ...]
Origins = dict[str, str]
"""Dotted path of a setting → where it was given."""
Elsewhere = Callable[[str, str], str]
"""(name, value) of an argument → the end of the error, where another program has a setting of that name; else ""."""
NAME = Setting("name", str)


class Spot(NamedTuple):
    """A setting in a tree of parts: its path, whose it is, and for a part its class and the data that stand there.

    `brought`: it belongs to a part that another choice brings along, as a preset its store.
    """

    path: Path
    owner: Any
    setting: Setting
    part: type | None
    data: Mapping[str, Any]
    brought: bool = False


class Change(NamedTuple):
    """One change as it was written, its key and its value."""

    said: str
    key: Path
    value: Any


def spots(
    target: Any, data: Mapping[str, Any], base: type | None = None, at: Path = (), brought: bool = False
) -> Iterator[Spot]:
    """Every setting of a class and of the parts in it, as `data` chooses them."""
    try:
        shown = target.spelled(data, "") if hasattr(target, "spelled") else data
    except SettingsError:
        shown = data
    for s in settings_of(target, base):
        part, path = part_of(s.hint), (*at, s.name)
        given = data.get(s.name, shown.get(s.name))
        here = _parts_data(part, _default(s) if given is None else given) if part is not None else {}
        yield Spot(path, target, s, part, here, brought)
        extra = brought or (s.name in shown and s.name not in data)
        if part is not None and registry.kind_of(part):
            yield Spot((*path, "name"), part, NAME, None, {}, extra)
            chosen = here.get("name") in registry.names(part)
            yield from spots(maker_of(part, here["name"]), here, part, path, extra) if chosen else ()
        elif part is not None:
            yield from spots(part, here, part, path, extra)


def changed(
    cls: type[Settings], data: Mapping[str, Any], said: Sequence[str], origins: Origins, elsewhere: Elsewhere
) -> dict[str, Any]:
    """`data` with the changes made, noted in `origins`. `elsewhere`: what is said of settings of other programs.

    A part is chosen before its own settings are set, whatever the order. Raises `SettingsError`.
    """
    found = dict(copy.deepcopy(dict(data)))
    waiting = [_parsed(each) for each in said]
    while waiting:
        there = {spot.path: spot for spot in spots(cls, found)}
        parts = [(len(here[0].path), i) for i, c in enumerate(waiting) if _is_part(here := ends(c.key, there))]
        change = waiting.pop(min(parts)[1] if parts else 0)
        path = _make(found, change, there, elsewhere)
        for old in [p for p in origins if p == path or p.startswith((f"{path}.", f"{path}["))]:
            del origins[old]
        origins[path] = f"argument {change.said!r}"
    return found


def _parts_data(part: type, given: Any) -> Mapping[str, Any]:
    short = "name" if registry.kind_of(part) else getattr(part, "short", None)
    if isinstance(given, str) and short:
        return {short: given}
    return given if isinstance(given, Mapping) else {}


def _default(s: Setting) -> Any:
    """The default as data; None where it has to be given."""
    return None if s.default is REQUIRED else to_data(s.default)


def _parsed(said: str) -> Change:
    key, sign, text = said.partition("=")
    if not sign or not key.strip():
        raise SettingsError(f"{said!r}: write a change as key=value, as in train.lr=1e-3")
    return Change(
        said, tuple(key.strip().split(".")), yamltext.parse(text, f"argument {said!r}")[0] if text.strip() else ""
    )


def _is_part(found: list[Spot]) -> bool:
    return len(found) == 1 and (found[0].part is not None or found[0].setting is NAME)


def ends(key: Path, there: Mapping[Path, Spot]) -> list[Spot]:
    """The settings that a key may mean: that of its path, or those whose paths end in it, the outer of nested ones,
    and where others are meant beside it, none of a part that is only brought along.
    """
    if key in there:
        return [there[key]]
    found = sorted((spot for path, spot in there.items() if path[-len(key) :] == key), key=lambda spot: len(spot.path))
    found = [spot for spot in found if not spot.brought] or found
    around = found[0].path[: -len(key)] if found else ()
    return found[:1] if all(spot.path[: len(around)] == around for spot in found) else found


def _meant(change: Change, there: Mapping[Path, Spot], elsewhere: Elsewhere) -> tuple[Spot, Path]:
    """The setting that a change names, and the key in it where it is a mapping."""
    for cut in range(len(change.key), 0, -1):
        found, rest = ends(change.key[:cut], there), ".".join(change.key[cut:])
        if len(found) > 1 and not rest:
            said = " or ".join(".".join(spot.path) for spot in found)
            raise SettingsError(f"argument {change.said!r}: {'.'.join(change.key)!r} may mean {said}: write it in full")
        if len(found) == 1 and (not rest or takes_mapping(found[0].setting.hint)):
            return found[0], (rest,) if rest else ()
    said = ".".join(change.key)
    names = {path[-1] for path in there} if len(change.key) == 1 else {".".join(path) for path in there}
    better = elsewhere(change.key[-1], change.said.partition("=")[2]) or suggest(said, names)
    raise SettingsError(f"argument {change.said!r}: there is no setting {said!r}{better}")


def _make(data: dict[str, Any], change: Change, there: Mapping[Path, Spot], elsewhere: Elsewhere) -> str:
    """Make one change; the dotted path at which it was made."""
    spot, rest = _meant(change, there, elsewhere)
    spot = there[spot.path[:-1]] if spot.setting is NAME else spot
    *above, leaf = (*spot.path, *rest)
    node = data
    for depth, key in enumerate(above, 1):
        parent = there[tuple(above[:depth])]
        said = parent.data if parent.part is not None else node.get(key)
        node[key] = dict(said) if isinstance(said, Mapping) else {}
        node = node[key]
    node[leaf] = _chosen(spot, change) if spot.part is not None and isinstance(change.value, str) else change.value
    return ".".join((*above, leaf))


def _chosen(spot: Spot, change: Change) -> Any:
    """The data of a part that is given by a text: its name, or what the text stands for."""
    assert spot.part is not None
    if registry.kind_of(spot.part) is None:
        short = getattr(spot.part, "short", None)
        return {**spot.data, short: change.value} if short else change.value
    maker_of(spot.part, change.value, f"argument {change.said!r}")
    return spot.data if spot.data.get("name") == change.value else {"name": change.value}
