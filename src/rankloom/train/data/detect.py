"""Which format a data set is in: by the fields of its records, on which all of them must agree."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rankloom.errors import DataError, suggest
from rankloom.train.data.read import kind
from rankloom.train.data.records import Row, Where, choice, fault


@dataclass(frozen=True, slots=True)
class Format:
    """`shapes`: alternative sets of fields that a record must have; `optional`: fields it may have besides."""

    shapes: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Shape:
    """A format together with the names its fields go by in this data set."""

    format: str
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.format!r} ({' + '.join(self.fields)})"

    def used(self) -> tuple[str, ...]:
        """The columns that this format reads."""
        return self.fields + FORMATS[self.format].optional


PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))
TURNS = (("messages",), ("conversations",))

FORMATS: dict[str, Format] = {
    "messages": Format(TURNS, ("tools",)),
    "sharegpt": Format(TURNS, ("system", "tools")),
    "alpaca": Format((("instruction", "output"),), ("input", "system")),
    "prompt": Format(PAIRS, ("system",)),
    "classification": Format((("text", "label"),)),
    "text": Format((("text",),)),
}
KNOWN_FIELDS = tuple(sorted({f for x in FORMATS.values() for f in (*x.optional, *(n for s in x.shapes for n in s))}))


def detect(rows: Sequence[Row | Mapping[str, Any]], format: str | None = None) -> str:
    """The format of `rows`: messages, sharegpt, alpaca, prompt, classification or text.

    A field that is null counts as absent. `format` forces one; its fields must then be there in every row.

    Raises:
        DataError: there are no rows, no format fits, or a row differs from the first (the first such row is named).
        SettingsError: `format` is unknown.
    """
    return shape_of(as_rows(rows, "rows"), format).format


def as_rows(rows: Iterable[Row | Mapping[str, Any]], source: str) -> list[Row]:
    """Records given in memory, as rows of `source`."""
    return [row if isinstance(row, Row) else _row(row, Where(source, n, "item")) for n, row in enumerate(rows, 1)]


def _row(fields: object, where: Where) -> Row:
    if not isinstance(fields, Mapping):
        raise fault(where, f"a record must be a mapping of fields, this is {kind(fields)}", "pass dicts")
    return Row(fields, where)


def shape_of(rows: Sequence[Row], format: str | None = None) -> Shape:
    """`detect`, together with the names of the fields."""
    shape = first_shape(rows, format)
    for row in rows:
        agree(row, rows[0].where, shape, format)
    return shape


def first_shape(rows: Sequence[Row], format: str | None = None) -> Shape:
    """The shape of the first row."""
    formats = _formats(format)
    if not rows:
        raise DataError("there are no records; give at least one")
    found = _guess(rows[0], formats)
    if found is None:
        raise fault(rows[0].where, *_unfit(rows[0], formats))
    return found


def agree(row: Row, first: Where, shape: Shape, format: str | None = None) -> None:
    """Refuse a row that is of another shape than the first."""
    found = _guess(row, _formats(format))
    if found is None:
        raise fault(row.where, *_unfit(row, (shape.format,)))
    if found != shape:
        raise fault(
            row.where,
            f"this record is {found} but the first ({first}) is {shape}",
            f"split the file, or force one with format={shape.format!r}",
        )


def _formats(format: str | None) -> tuple[str, ...]:
    return tuple(FORMATS) if format is None else (choice("format", format, tuple(FORMATS)),)


def _guess(row: Row, formats: tuple[str, ...]) -> Shape | None:
    there = tuple(name for name, value in row.fields.items() if value is not None)
    for shape in _fitting(there, formats):
        if len(formats) == 1 or _dialect(row, shape.format, shape.fields):
            return shape
    return None


@lru_cache(maxsize=1024)
def _fitting(there: tuple[str, ...], formats: tuple[str, ...]) -> tuple[Shape, ...]:
    """The shapes that a row with these fields may have."""
    return tuple(
        Shape(name, fields) for name in formats for fields in FORMATS[name].shapes if set(fields) <= set(there)
    )


def _dialect(row: Row, name: str, fields: Sequence[str]) -> bool:
    """messages and sharegpt share their columns; the first turn tells them apart ('role' or 'from')."""
    if fields not in TURNS:
        return True
    turns = row.fields[fields[0]]
    speaks = isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "from" in turns[0]
    return speaks == (name == "sharegpt")


def check_wanted(row: Row, shape: Shape) -> None:
    """Refuse answers that are marked as wanted or not: training on all of them would train the unwanted ones too."""
    for name in VERDICTS:
        if name in row.fields and _verdict(row.fields[name]):
            raise fault(
                row.where,
                f"field {name!r} = {row.fields[name]!r} beside {' + '.join(shape.fields)} says whether the answer "
                "is wanted (data for KTO); trained as it is, the model would learn unwanted answers too",
                f"keep the records whose answer is wanted and delete the column {name!r}",
            )


def _verdict(value: object) -> bool:
    """A boolean, or what CSV makes of one."""
    return isinstance(value, bool) or str(value).strip().lower() in ("true", "false", "0", "1")


def _unfit(row: Row, formats: Sequence[str]) -> tuple[str, str]:
    """(problem, next step) for a row that lacks fields."""
    there = [name for name, value in row.fields.items() if value is not None]
    if {"chosen", "rejected"} <= set(there):
        return "chosen + rejected are preferences between answers, not texts to train on", PREFERENCES
    if len(formats) > 1:
        wanted = "; ".join(f"{n}: {' + '.join(x.shapes[0])}" for n, x in FORMATS.items())
        near = "".join(suggest(name, KNOWN_FIELDS) for name in there if difflib.get_close_matches(name, KNOWN_FIELDS))
        return f"the fields {', '.join(map(repr, there))} fit no format{near} ({wanted})", RENAME
    fields = min(FORMATS[formats[0]].shapes, key=lambda s: sum(name not in there for name in s))
    missing = next(name for name in fields if name not in there)
    state = "is null" if missing in row.fields else "is missing"
    return f"field {missing!r} {state} for format {formats[0]!r}{suggest(missing, there)}", RENAME


VERDICTS = ("label", "labels", "desirable", "is_desirable", "kto_tag")
"""Columns in which data for KTO say whether an answer is wanted."""
PREFERENCES = "rename the column of the answer to train on with columns={'completion': 'chosen'}, beside a 'prompt'"
RENAME = "rename a column with columns={'field': 'your column'}"
