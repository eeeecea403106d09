"""A run from a YAML file and `key=value` changes; every refusal names the line or the argument that it comes from."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankloom.core.method import Method
from rankloom.core.plan import Plan
from rankloom.errors import FileError, SettingsError, suggest
from rankloom.registry import METHODS, STARTS, STORES, default_plan, load, maker, name_of
from rankloom.train.config import (
    SHORT,
    DataSettings,
    ModelSettings,
    RunConfig,
    as_data,
    from_data,
    method_data,
    normal,
)
from rankloom.train.settings import TrainSettings

Origins = dict[str, str]
"""Dotted path of a setting → where it was given."""
NAMED = ("method", "inner", "store", "start")
"""Settings that are objects with a name, in the order in which their names are applied."""
PARTS: Mapping[str, Mapping[str, str]] = {"plan.store": STORES, "plan.start": STARTS}
LONGEST, DEEPEST, ALIASES = 1 << 18, 50, 16
"""Letters, levels and aliases of a configuration that is read."""


def read_config(file: Path | None, changes: Sequence[str] = ()) -> RunConfig:
    """The run of a YAML file (None: all defaults) with changes `path=value`, or `leaf=value` where the leaf is unique.

    Raises `FileError` for a file that cannot be read, `SettingsError` for what it says; both name file and line.
    """
    data, origins = _read(file) if file is not None else ({}, {})
    data = normal(data)
    for change in sorted(changes, key=_methods_first):
        _apply(data, origins, change)
    try:
        return from_data(data)
    except SettingsError as error:
        origin = _origin(str(error), origins) or (str(file) if file is not None and not changes else "")
        raise type(error)(f"{origin}: {error}" if origin else str(error)) from error


def dump(config: RunConfig) -> str:
    """The run as YAML that `read_config` takes."""
    import yaml

    return str(yaml.safe_dump(as_data(config), sort_keys=False, allow_unicode=True))


def parse_value(text: str) -> Any:
    """A value as YAML 1.2 reads it: numbers (1e-3 too), true/false/null, [lists], {mappings}, else a string."""
    return _load(text, "value")[0] if text.strip() else ""


def _read(file: Path) -> tuple[dict[str, Any], Origins]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        there = [x.name for x in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
        raise FileError(f"{file}: no such file{suggest(file.name, there)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    data, lines = _load(text, str(file))
    if data is None:
        return {}, {}
    if not isinstance(data, dict):
        raise SettingsError(f"{file}: expected settings 'key: value', got {data!r}")
    return data, {path: f"{file}, line {line}" for path, line in lines.items()}


def _load(text: str, where: str) -> tuple[Any, dict[str, int]]:
    import yaml

    if len(text) > LONGEST:
        raise SettingsError(f"{where}: {len(text):,} letters; a configuration has at most {LONGEST:,}")
    loader = None
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        lines = dict(_lines(node, "", where, set())) if node is not None else {}
        return (loader.construct_document(node) if node is not None else None), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        raise SettingsError(f"{place}: not YAML: {error.problem}; check the indentation, colons and quotes") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{where}: not YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader with YAML 1.2 scalars: `no` and `1:30` are strings, `1e-3` is a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}
        depth = aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.aliases += self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > DEEPEST or self.aliases > ALIASES:
                raise yaml.YAMLError(f"more than {DEEPEST} levels, or more than {ALIASES} aliases")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    core = {
        "bool": (r"true|false|True|False|TRUE|FALSE", "tTfF"),
        "int": (r"[-+]?[0-9]+", "-+0123456789"),
        "float": (
            r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            "-+.0123456789",
        ),
        "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        "merge": (r"<<", "<"),
    }
    for tag, (pattern, first) in core.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", _integer)
    return Loader


def _integer(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 20:
        raise SettingsError(f"a whole number of {len(text)} digits is too large")
    return int(text)


def _lines(node: Any, path: str, where: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    import yaml

    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value) for key, _ in node.value]
        for number, (key, value) in enumerate(node.value):
            name, line = names[number], key.start_mark.line + 1
            if name in names[:number] and name != "<<":
                raise SettingsError(f"{where}, line {line}: {name!r} is given twice")
            inner = f"{path}.{name}" if path else name
            yield inner, line
            yield from _lines(value, inner, where, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, f"{path}[{number}]", where, seen)


def _methods_first(change: str) -> int:
    """A method, store or start decides which settings there are, so its name is applied before they are."""
    leaf = change.partition("=")[0].strip().rpartition(".")[2]
    return NAMED.index(leaf) if leaf in NAMED else len(NAMED)


def _apply(data: dict[str, Any], origins: Origins, change: str) -> None:
    key, sign, text = change.partition("=")
    if not sign or not key:
        raise SettingsError(f"{change!r}: write a change as key=value, as in train.lr=1e-3")
    methods = dict(_named(data))
    path = _path(key.strip(), {p: n for p, n in methods.items() if p not in PARTS or _at(data, p) is not None})
    value = parse_value(text)
    if path in methods or path == "plan.method":
        current = _at(data, path)
        value = method_data(value)
        if isinstance(current, Mapping) and isinstance(value, Mapping) and value == {"name": current.get("name")}:
            value = current
    elif path in PARTS and isinstance(value, str) and value not in PARTS[path]:
        raise SettingsError(f"argument {change!r}: no {key} {value!r}{suggest(value, PARTS[path])}")
    elif path in SHORT and isinstance(value, str):
        path = f"{path}.{SHORT[path]}"
    _put(data, path, value, methods)
    for old in [p for p in origins if p == path or p.startswith((f"{path}.", f"{path}["))]:
        del origins[old]
    origins[path] = f"argument {change!r}"


def _path(key: str, methods: Mapping[str, str]) -> str:
    """The full path that `key` means: itself, or the one path that ends in it."""
    known = list(_known(methods))
    if key in known:
        return key
    found = [p for p in known if p.endswith(f".{key}")]
    if len(found) > 1:
        raise SettingsError(f"{key!r} may mean {' or '.join(found)}: write it in full")
    parent, _, leaf = key.rpartition(".")
    inside = [p for p in known if p == parent or p.endswith(f".{parent}")] if parent else []
    if not found and len(inside) == 1 and inside[0] not in {"model", "data", "plan", "train", *methods}:
        return f"{inside[0]}.{leaf}"
    if not found:
        names = known if parent else {p.rpartition(".")[2] for p in known}
        raise SettingsError(f"there is no setting {key!r}{suggest(key, names)}")
    return found[0]


def _known(methods: Mapping[str, str]) -> Iterator[str]:
    """Every path that a change may name."""
    yield from (f.name for f in dataclasses.fields(RunConfig))
    sections = {"model": ModelSettings, "data": DataSettings, "plan": Plan, "train": TrainSettings}
    for section, cls in sections.items():
        yield from (f"{section}.{f.name}" for f in dataclasses.fields(cls) if (section, f.name) != ("train", "seed"))
    for path, name in methods.items():
        yield from (f"{path}.{setting}" for setting in _settings(path, name))


def _settings(path: str, name: str) -> Iterator[str]:
    """The settings of a store, a start, a method, or a preset: what it names itself, and its method's."""
    if path in PARTS:
        yield from (f.name for f in dataclasses.fields(load(PARTS[path][name])))
        return
    fields = [f.name for f in _fields(name)]
    made = maker(name)
    own = () if isinstance(made, type) else inspect.signature(made).parameters.values()
    yield from dict.fromkeys([*fields, *(p.name for p in own if p.kind is not p.VAR_KEYWORD)])


def _fields(name: str) -> Sequence[dataclasses.Field[Any]]:
    """The settings of a registered method, or of the method of a preset."""
    made = maker(name)
    return dataclasses.fields(made if isinstance(made, type) else type(default_plan(name).method))


def _named(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, registered name) of the plan's method, of the methods inside it, and of its store and start."""
    given = data.get("plan")
    plan: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    method = method_data(plan.get("method", "lora"))
    yield from _inside("plan.method", method)
    preset = method.get("name") if isinstance(method, Mapping) else None
    for path, table in PARTS.items():
        leaf = path.rpartition(".")[2]
        said = method_data(plan.get(leaf))
        name = said.get("name") if isinstance(said, Mapping) else None
        if name is None and preset in METHODS:
            name = name_of(type(getattr(default_plan(str(preset)), leaf)))
        if name in table:
            yield path, str(name)


def _inside(path: str, data: Any) -> Iterator[tuple[str, str]]:
    data = method_data(data)
    name = data.get("name") if isinstance(data, Mapping) else None
    if name not in METHODS:
        return
    yield path, str(name)
    for f in _fields(str(name)):
        given = data.get(f.name)
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        if given is None and isinstance(default, Method):
            given = name_of(type(default))
        if isinstance(default, Method) or (isinstance(given, Mapping) and given.get("name") in METHODS):
            yield from _inside(f"{path}.{f.name}", given)


def _at(data: Mapping[str, Any], path: str) -> Any:
    node: Any = data
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _put(data: dict[str, Any], path: str, value: Any, methods: Mapping[str, str]) -> None:
    *parents, leaf = path.split(".")
    node, here = data, ""
    for part in parents:
        here = f"{here}.{part}" if here else part
        child = node.get(part)
        child = method_data(child) if here in methods else child
        child = dict(copy.copy(child)) if isinstance(child, Mapping) else {}
        if here in methods:
            child.setdefault("name", methods[here])
        node[part] = child
        node = child
    node[leaf] = value


def _origin(message: str, origins: Origins) -> str:
    """Where the setting that an error speaks of was given, by the path at its head or the leaf that it begins with."""
    head, _, rest = message.partition(": ")
    path = re.sub(r"\([^)]*\)", "", head).removeprefix("the configuration.")
    unknown = re.search(r"has no setting '([^']+)'", rest or message)
    if unknown and path != message:
        path = unknown[1] if path not in origins and f"{path}.{unknown[1]}" not in origins else f"{path}.{unknown[1]}"
    elif unknown:
        path = unknown[1]
    while path:
        if path in origins:
            return origins[path]
        path = path.rpartition(".")[0]
    leaf = re.match(r"(?:[A-Za-z_]+\()?([A-Za-z_]\w*)=", message)
    found = {origin for p, origin in origins.items() if leaf and p.rpartition(".")[2] == leaf[1]}
    return found.pop() if len(found) == 1 else ""
