"""From rows of a known format to the canonical forms."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rankloom.errors import DataError, SettingsError, suggest
from rankloom.train.data.detect import KNOWN_FIELDS, Shape, agree, check_wanted, first_shape
from rankloom.train.data.lazy import Mapped
from rankloom.train.data.read import kind, leaves
from rankloom.train.data.records import (
    Chat,
    Labelled,
    Record,
    Records,
    Row,
    Rows,
    Text,
    Turn,
    Where,
    fault,
    fingerprint,
)

KNOWN = ("role", "content")
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def convert(
    rows: Rows,
    source: str,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    declared: Sequence[str] | None = None,
) -> Records:
    """The canonical records of `rows`, each checked once; see `load` for the arguments. `declared`: the source's own
    class names by id.
    """
    named = rename(rows, columns or {})
    shape = first_shape(named, format)
    if labels is not None and shape.format != "classification":
        raise SettingsError(f"labels= is for classification; {source} is {shape}")
    build = BUILDERS.get(shape.format)
    judged = shape.format not in ("classification", "text")
    first, met, seen = named[0].where, Met(shape, declared), set(shape.used())
    unused: set[str] = set()
    for row in named:
        agree(row, first, shape, format)
        if not row.fields.keys() <= seen:
            unused |= row.fields.keys() - seen
            seen |= unused
        if judged:
            check_wanted(row, shape)
        if build is None:
            met.add(row)
        else:
            build(row, shape.fields)
    if build is not None:
        items: Sequence[Record] = Mapped(named, lambda row: build(row, shape.fields))
        names: tuple[str, ...] = ()
    else:
        ids, names = met.ids(labels or classes)
        items = Mapped(named, lambda row: Labelled(met.text(row), ids[met.value(row)], row.where))
    said = (rows.digest(), repr(shape), repr(columns), repr(names), repr(declared))
    return Records(items, shape.format, source, names, tuple(sorted(unused)), fingerprint(*said))


def rename(rows: Sequence[Row], columns: Mapping[str, str]) -> Sequence[Row]:
    """Rows whose column `columns[field]` is called `field`."""
    for name in columns:
        if name not in KNOWN_FIELDS:
            raise SettingsError(f"columns: {name!r} is not a field of any format{suggest(name, KNOWN_FIELDS)}")
    return Mapped(rows, lambda row: Row(_renamed(row, columns), row.where)) if columns else rows


def _renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    for name, column in columns.items():
        if column not in row.fields:
            near = suggest(column, row.fields)
            raise fault(row.where, f"there is no column {column!r} (columns: {name} = {column}){near}", "mend columns=")
    taken = set(columns.values()) | set(columns)
    kept = {name: value for name, value in row.fields.items() if name not in taken}
    return kept | {name: row.fields[column] for name, column in columns.items()}


def string(value: object, where: Where, field: str) -> str:
    """`value` if it is a string, else the error that names the field."""
    if not isinstance(value, str):
        raise fault(where, f"field {field!r} must be a string, is {kind(value)}", "mend or delete this record")
    return _encodable(value, where, field)


def _encodable(text: str, where: Where, field: str) -> str:
    """`text` if UTF-8 can hold it: half of a surrogate pair (`\\ud800`) is no character."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise fault(
                where,
                f"field {field!r} holds half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
                f"{error.start + 1}, which is no text",
                "mend or delete this record",
            ) from error
    return text


def _clean(value: Any, where: Where, path: str) -> Any:
    """`value` if every text in it can be encoded."""
    for place, part in leaves(value, path):
        if isinstance(part, str):
            _encodable(part, where, place)
    return value


def _listed(value: object, where: Where, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise fault(where, f"field {field!r} must be a list, is {kind(value)}", "mend or delete this record")
    return value


def _object(value: object, where: Where, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise fault(where, f"field {field!r} must be an object, is {kind(value)}", "mend or delete this record")
    return value


def _system(row: Row) -> tuple[Turn, ...]:
    value = row.fields.get("system")
    return () if value in (None, "") else (Turn("system", string(value, row.where, "system")),)


def _tools(row: Row) -> tuple[Any, ...]:
    value = row.fields.get("tools")
    return () if value is None else tuple(_clean(_listed(value, row.where, "tools"), row.where, "tools"))


def _messages(row: Row, fields: tuple[str, ...]) -> Chat:
    turns = _turns(row, fields[0])
    return Chat(
        tuple(_message(turn, row.where, f"{fields[0]}[{i}]") for i, turn in enumerate(turns)), row.where, _tools(row)
    )


def _turns(row: Row, field: str) -> list[Any]:
    turns = _listed(row.fields[field], row.where, field)
    if not turns:
        raise fault(row.where, f"field {field!r} is an empty list", "mend or delete this record")
    return turns


def _message(turn: object, where: Where, path: str) -> Turn:
    fields = {name: value for name, value in _object(turn, where, path).items() if value is not None}
    role = _member(fields, "role", where, path)
    if role not in ROLES:
        raise fault(where, f"{path}.role = {role!r} is unknown{suggest(role, ROLES)}", "mend the role")
    extra = {name: _clean(value, where, f"{path}.{name}") for name, value in fields.items() if name not in KNOWN}
    if "content" not in fields and extra.get("tool_calls"):
        return Turn(role, "", extra)
    content = fields.get("content")
    return Turn(
        role,
        _joined(content, where, path) if isinstance(content, list) else _member(fields, "content", where, path),
        extra,
    )


def _member(fields: Mapping[str, Any], name: str, where: Where, path: str) -> str:
    if name not in fields:
        raise fault(where, f"{path}.{name} is missing{suggest(name, fields)}", "mend or delete this record")
    return string(fields[name], where, f"{path}.{name}")


def _joined(parts: list[Any], where: Where, path: str) -> str:
    """OpenAI's list of content parts, of which only text is a chat of this kind."""
    texts = []
    for i, part in enumerate(parts):
        fields = _object(part, where, f"{path}.content[{i}]")
        if fields.get("type") != "text":
            raise fault(
                where,
                f"{path}.content[{i}].type = {fields.get('type')!r}: only 'text' parts can be read",
                "leave it out",
            )
        texts.append(_member(fields, "text", where, f"{path}.content[{i}]"))
    return "".join(texts)


def _sharegpt(row: Row, fields: tuple[str, ...]) -> Chat:
    turns = tuple(_said(turn, row.where, f"{fields[0]}[{i}]") for i, turn in enumerate(_turns(row, fields[0])))
    return Chat(_system(row) + turns, row.where, _tools(row))


def _said(turn: object, where: Where, path: str) -> Turn:
    fields = _object(turn, where, path)
    speaker = _member(fields, "from", where, path)
    if speaker not in SHAREGPT_ROLES:
        raise fault(
            where, f"{path}.from = {speaker!r} is unknown{suggest(speaker, SHAREGPT_ROLES)}", "mend the speaker"
        )
    return Turn(SHAREGPT_ROLES[speaker], _member(fields, "value", where, path))


def _prompt(row: Row, fields: tuple[str, ...]) -> Chat:
    asked, answered = (string(row.fields[name], row.where, name) for name in fields)
    return Chat((*_system(row), Turn("user", asked), Turn("assistant", answered)), row.where)


def _alpaca(row: Row, fields: tuple[str, ...]) -> Chat:
    """Instruction and input are joined by a blank line."""
    asked, answered = (string(row.fields[name], row.where, name) for name in fields)
    more = row.fields.get("input")
    context = "" if more is None else string(more, row.where, "input")
    asked = f"{asked}\n\n{context}" if context else asked
    return Chat((*_system(row), Turn("user", asked), Turn("assistant", answered)), row.where)


def _text(row: Row, fields: tuple[str, ...]) -> Text:
    return Text(string(row.fields[fields[0]], row.where, fields[0]), row.where)


BUILDERS: dict[str, Callable[[Row, tuple[str, ...]], Record]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt": _prompt,
    "text": _text,
}


class UnknownClassError(DataError):
    """A label that is none of the classes given."""


class Met:
    """The classes that the rows of a classification have: each value once, with the first row that has it."""

    def __init__(self, shape: Shape, declared: Sequence[str] | None) -> None:
        self.fields, self.declared = shape.fields, declared
        self.where: dict[str | int, Where] = {}

    def text(self, row: Row) -> str:
        """The row's text."""
        return string(row.fields[self.fields[0]], row.where, self.fields[0])

    def value(self, row: Row) -> str | int:
        """The row's class: a name, or a number that is no id of the names declared."""
        return _declared(_label(row, self.fields[1]), row.where, self.fields[1], self.declared)

    def add(self, row: Row) -> None:
        """Check a row and take in its class."""
        self.text(row)
        value = self.value(row)
        if value not in self.where and any(type(value) is not type(other) for other in self.where):
            other = next(iter(self.where))
            raise fault(
                row.where,
                f"field {self.fields[1]!r} is {kind(value)}, in the first record {kind(other)}",
                "use one kind",
            )
        self.where.setdefault(value, row.where)

    def ids(self, labels: Sequence[str] | None) -> tuple[dict[str | int, int], tuple[str, ...]]:
        """(the id of each value, the names by id): `labels`, or the names met, in numeric or alphabetic order."""
        file = next(iter(self.where.values())).file
        names = tuple(labels or _names(tuple(self.where), file, self.fields[1]))
        if len(names) < 2:
            raise DataError(f"{file}: every label is {names[0]!r}; a classifier needs two classes or more")
        known = {name: i for i, name in enumerate(names)}
        every = tuple(self.where)
        return {v: _id(v, known, where, self.fields[1], every) for v, where in self.where.items()}, names


def _label(row: Row, field: str) -> str | int:
    value = row.fields[field]
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise fault(
            row.where, f"field {field!r} must be a string or a whole number, is {kind(value)}", "mend this record"
        )
    if isinstance(value, str) and not value.strip():
        raise fault(row.where, f"field {field!r} is empty", "give the class, or delete this record")
    return string(value, row.where, field).strip() if isinstance(value, str) else value


def _declared(value: str | int, where: Where, field: str, names: Sequence[str] | None) -> str | int:
    if names is None or isinstance(value, str):
        return value
    if not 0 <= value < len(names):
        raise fault(where, f"field {field!r} = {value} is no id of the {len(names)} classes declared", "leave it out")
    return names[value]


def _number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def names_by_id(names: Iterable[str]) -> tuple[str, ...]:
    """Class names in numeric order, or else in alphabetic order."""
    each = set(names)
    return tuple(sorted(each, key=int) if all(map(_number, each)) else sorted(each))


def _names(values: Sequence[str | int], source: str, field: str) -> tuple[str, ...]:
    names = {str(value) for value in values}
    if all(map(DECIMAL.fullmatch, names)) and not all(map(_number, names)):
        raise fault(
            source,
            f"field {field!r} holds numbers with decimals ({', '.join(sorted(names)[:3])} …), not classes",
            "give classes by name, or train a regression by rankloom.fit with batches of your own",
        )
    return names_by_id(names)


DECIMAL = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def _id(value: str | int, ids: Mapping[str, int], where: Where, field: str, every: Sequence[str | int]) -> int:
    """A class by its name; a number that is no name is an id, when the names themselves are words."""
    name = str(value)
    if name in ids:
        return ids[name]
    if _number(name) and 0 <= int(name) < len(ids) and not any(map(_number, ids)):
        return int(name)
    met = sorted({str(v) for v in every})
    raise UnknownClassError(
        f"{where}: field {field!r} = {value!r} is not a class{suggest(name, ids)}: the data has {len(met)} "
        f"({', '.join(met[:8])}{', …' * (len(met) > 8)}), known are {len(ids)} ({', '.join(list(ids)[:8])}"
        f"{', …' * (len(ids) > 8)}); mend the label or labels="
    )
