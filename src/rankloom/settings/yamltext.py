"""YAML 1.2 as settings need it: scalars, lists and mappings with text for keys, and the line of each.

`no` and `1:30` are text, `1e-3` is a number. A key that is given twice, tags of other types, deep or long texts are
refused, so nothing but `SettingsError` comes out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from rankloom.errors import SettingsError

LONGEST, DEEPEST, ALIASES, DIGITS = 1 << 18, 50, 16, 20
"""Letters, levels, aliases, and digits of a whole number, of a text that is read."""
TAG = "tag:yaml.org,2002:"
SCALARS = {
    "bool": (r"true|false|True|False|TRUE|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
"""YAML 1.2's core schema, and the merge key."""


def parse(text: str, where: str) -> tuple[Any, dict[str, int]]:
    """(the data, {dotted path: line}). Raises `SettingsError` that names `where` and the line."""
    import yaml

    if len(text) > LONGEST:
        raise SettingsError(f"{where}: {len(text):,} letters; a configuration has at most {LONGEST:,}")
    loader = None
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines = dict(_lines(node, "", where, set()))
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        raise SettingsError(f"{place}: not YAML: {error.problem}; check the indentation, colons and quotes") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{where}: not YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()


def dump(data: Any) -> str:
    """The text that `parse` reads as `data`, and so does a parser of YAML 1.1."""
    import yaml

    return str(yaml.dump(data, Dumper=_dumper(), sort_keys=False, allow_unicode=True))


@functools.cache
def _dumper() -> Any:
    """PyYAML's safe dumper, which quotes what YAML 1.1 would take for something else, and what 1.2 would."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return _resolving(Dumper)


def _resolving(cls: Any) -> Any:
    """`cls` with the core schema's scalars."""
    for tag, (pattern, first) in SCALARS.items():
        cls.add_implicit_resolver(TAG + tag, re.compile(rf"(?:{pattern})\Z"), list(first))
    return cls


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader with the core schema and no other types."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}
        yaml_constructors = {
            tag: make
            for tag, make in yaml.SafeLoader.yaml_constructors.items()
            if tag is None or tag.removeprefix(TAG) in ("null", "str", "seq", "map")
        }
        depth = aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.aliases += self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > DEEPEST or self.aliases > ALIASES:
                raise yaml.YAMLError(f"more than {DEEPEST} levels, or more than {ALIASES} aliases")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    for tag, make in (("bool", lambda said: said.lower() == "true"), ("int", int), ("float", _float)):
        Loader.add_constructor(TAG + tag, functools.partial(_scalar, tag, make))
    return _resolving(Loader)


def _scalar(tag: str, make: Any, loader: Any, node: Any) -> Any:
    import yaml

    said = loader.construct_scalar(node)
    if not re.fullmatch(SCALARS[tag][0], said):
        raise yaml.constructor.ConstructorError(None, None, f"{said[:40]!r} is no {tag}", node.start_mark)
    if tag == "int" and len(said) > DIGITS + 1:
        problem = f"a whole number of {len(said)} digits is too large"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return make(said)


def _float(said: str) -> float:
    return float(said.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _lines(node: Any, path: str, where: str, seen: set[int]) -> Iterator[tuple[str, int]]:
    import yaml

    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for key, item in node.value:
            line = key.start_mark.line + 1
            if key.tag not in (f"{TAG}str", f"{TAG}merge"):
                said = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
                raise SettingsError(f"{where}, line {line}: the key {said} is no text: write it in quotes")
            if key.value in names and key.value != "<<":
                raise SettingsError(f"{where}, line {line}: {key.value!r} is given twice")
            names.add(key.value)
            inner = f"{path}.{key.value}" if path else key.value
            yield inner, line
            yield from _lines(item, inner, where, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield f"{path}[{number}]", item.start_mark.line + 1
            yield from _lines(item, f"{path}[{number}]", where, seen)
