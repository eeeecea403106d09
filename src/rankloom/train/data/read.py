"""Files of records: JSONL, JSON, CSV, TSV, Parquet and plain text, each row with its line."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import stat
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from rankloom.errors import DataError, MissingExtra
from rankloom.train.data.records import Listed, Row, Rows, Where, fault

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
LINE, WHOLE, PIECE = 1 << 26, 1 << 31, 1 << 24
"""Most bytes of a line, and of a file that has to be read as a whole; bytes read at a time."""
KINDS = {stat.S_ISFIFO: "a named pipe", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device", stat.S_ISDIR: "a folder"}
BLOCK = 1024
"""Rows of a Parquet file that are turned into records at a time."""


def read_file(path: Path) -> Rows:
    """The rows of one file, by its suffix. Blank lines, a byte-order mark and CRLF are passed over.

    JSONL, text and Parquet are read row by row when they are needed; JSON, CSV and TSV are held in memory.

    Raises:
        DataError: the file cannot be read, is empty, or a line is broken (named).
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise fault(str(path), f"no reader for {path.suffix or 'a file without suffix'!r}", f"use {', '.join(READERS)}")
    try:
        _check_regular(path)
        rows = reader(path)
    except OSError as error:
        raise fault(
            str(path), f"cannot be read: {error.strerror or error}", "check the path and its permissions"
        ) from error
    if not rows:
        raise fault(str(path), "holds no records", "give a file with at least one")
    return rows


def _check_regular(path: Path) -> None:
    """Refuse what has no end or is no file: pipes, devices, sockets."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = next((name for test, name in KINDS.items() if test(mode)), "no regular file")
        raise fault(str(path), f"is {what}, not a file of records", "give a regular file")


class Lines(Rows):
    """The non-blank lines of a file, split at LF alone (a text may hold U+2028), without CR; `parse` makes the row.

    The file stays open, and a line is read when it is needed.
    """

    def __init__(self, path: Path, parse: Callable[[Where, str], Row]) -> None:
        self.path, self.parse = path, parse
        self.file = path.open("rb")
        self.starts, self.sizes, self.numbers = array("q"), array("q"), array("q")
        found, at = hashlib.blake2b(digest_size=16), 0
        for number, raw in enumerate(iter(lambda: self.file.readline(LINE + 1), b""), 1):
            where = Where(str(path), number)
            _check_line(where, raw)
            found.update(raw)
            if not _is_blank(raw):
                self.starts.append(at)
                self.sizes.append(len(raw))
                self.numbers.append(number)
            at += len(raw)
        self._digest = found.hexdigest()

    def __len__(self) -> int:
        return len(self.starts)

    def at(self, index: int) -> Row:
        where = Where(str(self.path), self.numbers[index])
        raw = os.pread(self.file.fileno(), self.sizes[index], self.starts[index])
        if where.line == 1:
            raw = _without_bom(where, raw)
        return self.parse(where, _decode(where, raw).rstrip("\r\n"))

    def digest(self) -> str:
        return self._digest


def _check_line(where: Where, raw: bytes) -> None:
    if where.line == 1:
        _without_bom(where, raw)
    if b"\0" in raw:
        raise fault(where, "holds NUL bytes: a sparse, damaged or binary file", "save it as UTF-8 text")
    if len(raw) > LINE:
        raise fault(where, f"longer than {LINE:,} bytes", "write one record per line")


def _is_blank(raw: bytes) -> bool:
    return not raw.strip() or (len(raw) < 64 and not raw.decode("utf-8", "replace").removeprefix("\ufeff").strip())


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


def _whole(path: Path) -> tuple[str, bytes]:
    """(the text of a file, its bytes)."""
    pieces, size = [], 0
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(PIECE), b""):
            if b"\0" in piece and piece[:2] not in UTF16:
                raise fault(str(path), "holds NUL bytes: a sparse, damaged or binary file", "save it as UTF-8 text")
            pieces.append(piece)
            size += len(piece)
            if size > WHOLE:
                raise fault(
                    str(path), f"more than {WHOLE:,} bytes, too many for a {path.suffix} file", "use JSONL or Parquet"
                )
    raw = _without_bom(Where(str(path), 1), b"".join(pieces))
    lines = enumerate(raw.splitlines(keepends=True), 1)
    return "".join(_decode(Where(str(path), n), line) for n, line in lines), raw


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
    except ValueError as error:
        field = _huge(text, start)
        raise fault(where, f"field {field!r} is a number of too many digits", "write it as a string") from error


def _huge(text: str, start: int) -> str:
    """The path of the first whole number that Python does not read."""
    value, _ = json.JSONDecoder(parse_int=_Digits).raw_decode(text, start)
    return next((path for path, part in leaves(value, "") if isinstance(part, _Digits) and part.many), "?")


class _Digits(str):
    @property
    def many(self) -> bool:
        return len(self) > sys.get_int_max_str_digits() > 0


def leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a record that is no list and no object; keys of objects are leaves too."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield f"{path}.{key}" if path else str(key), key
            yield from leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from leaves(part, f"{path}[{i}]")
    else:
        yield path, value


def _object(where: Where, value: Any) -> Row:
    if not isinstance(value, dict):
        raise fault(where, f"a record must be an object {{…}}, this is {kind(value)}", "one record has named fields")
    return Row(value, where)


def kind(value: object) -> str:
    """The name of a value's type as JSON calls it."""
    names = {bool: "a boolean", dict: "an object", float: "a number", int: "a number", list: "a list", str: "a string"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _record(where: Where, line: str) -> Row:
    value, end = _value(where, line, _blank(line, 0), top=where.line)
    if line[end:].strip():
        raise fault(where, f"text after the record at column {end + 1}", "one record per line")
    return _object(where, value)


def _jsonl(path: Path) -> Rows:
    return Lines(path, _record)


def _text(path: Path) -> Rows:
    return Lines(path, lambda where, line: Row({"text": line}, where))


def _held(read: Callable[[Path, str], Iterator[Row]]) -> Callable[[Path], Rows]:
    """A reader of files that are held in memory."""

    def held(path: Path) -> Rows:
        text, raw = _whole(path)
        return Listed(list(read(path, text)), raw)

    return held


def _json(path: Path, text: str) -> Iterator[Row]:
    """A list of objects, or objects one after the other; decoded one by one, so that each knows its line."""
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


def _table(delimiter: str) -> Callable[[Path, str], Iterator[Row]]:
    def read(path: Path, text: str) -> Iterator[Row]:
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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


class ParquetRows(Rows):
    """The rows of a Parquet file; a block of them is in memory, and the row group that it lies in."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtra("pyarrow", "data", f"reading {path}") from error
        self.path, self.broken = path, pa.ArrowException
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
        except pa.ArrowException as error:
            raise self._fault(error) from error
        meta = self.file.metadata
        self.ends = list(accumulate(meta.row_group(i).num_rows for i in range(meta.num_row_groups)))
        self._group: tuple[int, Any] = (-1, None)
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def at(self, index: int) -> Row:
        group = bisect_right(self.ends, index)
        start = index - (self.ends[group - 1] if group else 0)
        first = index - start % BLOCK
        if self._block[0] != first:
            self._block = (first, self._rows(group, start - start % BLOCK))
        return Row(self._block[1][index - first], Where(str(self.path), index + 1, "row"))

    def _rows(self, group: int, start: int) -> list[dict[str, Any]]:
        try:
            if self._group[0] != group:
                self._group = (group, self.file.read_row_group(group))
            rows: list[dict[str, Any]] = self._group[1].slice(start, BLOCK).to_pylist()
        except (self.broken, UnicodeDecodeError) as error:
            raise self._fault(error) from error
        return rows

    def _fault(self, error: Exception) -> DataError:
        return fault(str(self.path), f"broken Parquet: {error}", "write the file again")

    def digest(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _held(_json),
    ".csv": _held(_table(",")),
    ".tsv": _held(_table("\t")),
    ".parquet": ParquetRows,
    ".txt": _text,
}
