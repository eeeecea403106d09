"""Files of records: JSONL, JSON, CSV, TSV, Parquet and plain text, each row with its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rankloom.errors import MissingExtra
from rankloom.train.data.records import Row, Where, fault

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_file(path: Path) -> list[Row]:
    """The rows of one file, by its suffix. Blank lines, a byte-order mark and CRLF are passed over.

    Raises:
        DataError: the file cannot be read, is empty, or a line is broken (named).
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise fault(str(path), f"no reader for {path.suffix or 'a file without suffix'!r}", f"use {', '.join(READERS)}")
    try:
        rows = list(reader(path))
    except OSError as error:
        raise fault(
            str(path), f"cannot be read: {error.strerror or error}", "check the path and its permissions"
        ) from error
    if not rows:
        raise fault(str(path), "holds no records", "give a file with at least one")
    return rows


def _lines(path: Path) -> Iterator[tuple[Where, str]]:
    """The non-blank lines, split at LF alone (a text may hold U+2028), without CR."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = Where(str(path), number)
            if number == 1:
                raw = _without_bom(where, raw)
            text = _decode(where, raw).rstrip("\r\n")
            if text.strip():
                yield where, text


def _without_bom(where: Where, raw: bytes) -> bytes:
    if raw[:2] in UTF16:
        raise fault(where, "the file is UTF-16", "save it as UTF-8")
    return raw.removeprefix(BOM)


def _decode(where: Where, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault(
            where, f"byte {error.start + 1} is not UTF-8 (0x{raw[error.start]:02x})", "save it as UTF-8"
        ) from error


def _whole(path: Path) -> str:
    raw = _without_bom(Where(str(path), 1), path.read_bytes())
    return "".join(_decode(Where(str(path), n), line) for n, line in enumerate(raw.splitlines(keepends=True), 1))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise KeyError(twice)
    return fields


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


def _value(where: Where, text: str, start: int = 0, *, top: int) -> tuple[Any, int]:
    """The JSON value at `start` and the position behind it; `top` is the line on which `text` begins."""
    try:
        return _JSON.raw_decode(text, start)
    except json.JSONDecodeError as error:
        place = Where(where.file, top + error.lineno - 1)
        raise fault(place, f"broken JSON at column {error.colno}: {error.msg}", "mend or delete this record") from error
    except KeyError as error:
        raise fault(where, f"field {error.args[0]!r} is given twice", "keep one of them") from error
    except RecursionError as error:
        raise fault(where, "JSON nested too deeply", "mend or delete this record") from error


def _object(where: Where, value: Any) -> Row:
    if not isinstance(value, dict):
        raise fault(where, f"a record must be an object {{…}}, this is {kind(value)}", "one record has named fields")
    return Row(value, where)


def kind(value: object) -> str:
    """The name of a value's type as JSON calls it."""
    names = {bool: "a boolean", dict: "an object", float: "a number", int: "a number", list: "a list", str: "a string"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _jsonl(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        value, end = _value(where, line, _blank(line, 0), top=where.line)
        if line[end:].strip():
            raise fault(where, f"text after the record at column {end + 1}", "one record per line")
        yield _object(where, value)


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or objects one after the other; decoded one by one, so that each knows its line."""
    text = _whole(path)
    at = _blank(text, 0)
    opening = text[at : at + 1]
    if opening not in ("", "[", "{"):
        raise fault(Where(str(path), 1), "neither a list of objects nor objects line by line", "write [ {…}, … ]")
    listed = opening == "["
    at = _blank(text, at + 1) if listed else at
    line, seen = 1, 0
    while at < len(text) and text[at] != "]":
        line, seen = line + text.count("\n", seen, at), at
        where = Where(str(path), line)
        value, end = _value(where, text, at, top=1)
        yield _object(where, value)
        at = _comma(where, text, _blank(text, end)) if listed else _blank(text, end)
    if listed and (at == len(text) or text[at + 1 :].strip()):
        raise fault(str(path), "the list does not end the file with ']'", "mend the end of the file")


def _comma(where: Where, text: str, at: int) -> int:
    if text[at : at + 1] == ",":
        return _blank(text, at + 1)
    if text[at : at + 1] in ("]", ""):
        return at
    raise fault(where, "no ',' or ']' after this record", "mend the list")


def _blank(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _table(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def read(path: Path) -> Iterator[Row]:
        lines = csv.reader(io.StringIO(_whole(path), newline=""), delimiter=delimiter, strict=True)
        start, header = 1, None
        while True:
            where = Where(str(path), start)
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                raise fault(where, f"broken table: {error}", "mend the quotes, or use JSONL") from error
            start = lines.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(where, cells, delimiter)
            elif len(cells) != len(header):
                raise fault(
                    where,
                    f"{len(cells)} cells under {len(header)} columns ({', '.join(header)})",
                    "quote the delimiter",
                )
            else:
                yield Row(dict(zip(header, cells)), where)

    return read


def _header(where: Where, cells: list[str], delimiter: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    twice = [name for i, name in enumerate(header) if name in header[:i]]
    if twice or not all(header):
        raise fault(
            where, f"column {twice[0]!r} is given twice" if twice else "a column has no name", "mend the header"
        )
    for other in (";", "\t", ","):
        if len(header) == 1 and other != delimiter and other in header[0]:
            raise fault(
                where, f"the header {header[0]!r} seems to be split by {other!r}, not {delimiter!r}", "mend the suffix"
            )
    return header


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", f"reading {path}") from error
    try:
        fields = pq.ParquetFile(path).read().to_pylist()
    except pa.ArrowException as error:
        raise fault(str(path), f"broken Parquet: {error}", "write the file again") from error
    for number, row in enumerate(fields, 1):
        yield Row(row, Where(str(path), number, "row"))


def _text(path: Path) -> Iterator[Row]:
    for where, line in _lines(path):
        yield Row({"text": line}, where)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _text,
}
