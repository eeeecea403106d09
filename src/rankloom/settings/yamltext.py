"""YAML 1.2 as settings need it: scalars, lists and mappings with text for keys, and the line of each.

`no` and `1:30` are text, `1e-3` is a number. A key that is given twice, tags of other types, deep or long texts are
refused, so nothing but `SettingsError` comes out.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from rankloom.errors import SettingsError

LONGEST, DEEPEST, ALIASES, DIGITS = 1 << 18, 50, 16, 20
"""Letters, levels, aliases, and digits of a whole number, of a text that is read."""
TAG = "tag:yaml.org,2002:"
FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
SCALARS: dict[str, tuple[str, str, Any]] = {
    "bool": (r"true|false|True|False|TRUE|FALSE", "tTfF", lambda said: said.lower() == "true"),
    "int": (r"[-+]?[0-9]+", "-+0123456789", int),
    "float": (FLOAT, "-+.0123456789", lambda said: float(said.lower().replace(".inf", "inf").replace(".nan", "nan"))),
    "null": (r"~|null|Null|NULL|", "~nN", lambda said: None),
}
"""YAML 1.2's core schema: what a scalar of each type looks like, the letters it may begin with, its value."""
BREAKS = re.compile("[\r\x85\u2028\u2029\ufeff]")
"""What PyYAML reads as the end of a line, or drops, outside double quotes."""


def parse(text: str, where: str) -> tuple[Any, dict[str, int]]:
    """(the data, {dotted path: line}). Raises `SettingsError` that names `where` and the line."""
    import yaml

    if len(text) > LONGEST:
        raise SettingsError(f"{where}: {len(text):,} letters; a configuration has at most {LONGEST:,}")
    lines: dict[str, int] = {}
    loader = None
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        return (None if node is None else loader.value(node, "", lines, DEEPEST)), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}" if mark is not None else where
        said = f"not YAML: {error.problem}; check the indentation, colons and quotes"
        ours = isinstance(error, yaml.constructor.ConstructorError)
        raise SettingsError(f"{place}: {error.problem if ours else said}") from error
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
def _loader() -> Any:
    """PyYAML's composer with the core schema, and values that remember their lines."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: dict[str, Any] = {}
        depth = aliases = 0

        def fetch_flow_collection_start(self, kind: Any) -> None:
            """An opening bracket; the scanner reads a thousand of them before anything is composed."""
            if self.flow_level >= DEEPEST:
                raise yaml.YAMLError(f"more than {DEEPEST} levels")
            super().fetch_flow_collection_start(kind)

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.aliases += self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > DEEPEST or self.aliases > ALIASES:
                raise yaml.YAMLError(f"more than {DEEPEST} levels, or more than {ALIASES} aliases")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def value(self, node: Any, path: str, lines: dict[str, int], depth: int) -> Any:
            """The value of a node, and the line of everything in it."""
            lines |= {path: node.start_mark.line + 1} if path and path not in lines else {}
            kind = node.tag.removeprefix(TAG)
            if not depth:
                raise _problem(node, f"more than {DEEPEST} levels")
            if (kind, node.id) == ("seq", "sequence"):
                return [self.value(item, f"{path}[{i}]", lines, depth - 1) for i, item in enumerate(node.value)]
            if (kind, node.id) == ("map", "mapping"):
                return self.mapping(node, path, lines, depth)
            if node.id != "scalar" or kind not in (*SCALARS, "str"):
                raise _problem(node, f"{node.tag} is no type of a setting")
            pattern, _, make = SCALARS.get(kind, (".*", "", str))
            if not re.fullmatch(pattern, node.value, re.DOTALL) or (kind == "int" and len(node.value) > DIGITS + 1):
                raise _problem(node, f"{node.value[:40]!r} is no {kind} of at most {DIGITS} digits")
            return make(node.value)

        def mapping(self, node: Any, path: str, lines: dict[str, int], depth: int) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, item in node.value:
                if key.tag != f"{TAG}str" or key.id != "scalar":
                    said = repr(key.value) if key.id == "scalar" else "that is a list or mapping"
                    raise _problem(key, f"the key {said} is no text: write it in quotes")
                if key.value in found:
                    raise _problem(key, f"{key.value!r} is given twice")
                inner = f"{path}.{key.value}" if path else key.value
                lines[inner] = key.start_mark.line + 1
                found[key.value] = self.value(item, inner, lines, depth - 1)
            return found

    return _resolving(Loader)


def _problem(node: Any, said: str) -> Exception:
    import yaml

    return yaml.constructor.ConstructorError(None, None, said, node.start_mark)


@functools.cache
def _dumper() -> Any:
    """PyYAML's safe dumper, which quotes what YAML 1.1 would take for something else, and what 1.2 would."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def written(self, text: str) -> Any:
            """A text; within double quotes where it has breaks that the other styles fold or drop."""
            return self.represent_scalar(f"{TAG}str", text, style='"' if BREAKS.search(text) else None)

    Dumper.add_representer(str, Dumper.written)
    return _resolving(Dumper)


def _resolving(cls: Any) -> Any:
    """`cls` with the core schema's scalars."""
    for tag, (pattern, first, _) in SCALARS.items():
        cls.add_implicit_resolver(TAG + tag, re.compile(rf"(?:{pattern})\Z"), [*first, *([""] * (tag == "null"))])
    return cls
