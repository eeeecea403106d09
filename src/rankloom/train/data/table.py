"""Tokenised records as an Arrow table on disk, mapped into memory when it is read, found again by what decides it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from rankloom.errors import DataError, MissingExtra
from rankloom.files import disk
from rankloom.files.folders import drop, hidden_beside, make_parents, put, replace_file
from rankloom.train.data.examples import Block, Builder, Examples

TABLE, ABOUT = "examples.arrow", "about.json"
FORM = 2
"""Counted up when what a table holds, or how, changes."""
About = dict[str, Any]


def default_cache() -> Path:
    """The folder for tables: `$RANKLOOM_CACHE`, else `rankloom` in the user's cache folder."""
    own = os.environ.get("RANKLOOM_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rankloom"


def available() -> bool:
    """Whether tables can be written and read here."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


def open_or_make(folder: Path, make: Callable[[Builder], About]) -> tuple[Examples, About]:
    """The table in `folder`, with what was said of it; made by `make`, which fills a builder, where there is none.

    A table whose bytes are not those that were written is made again.
    """
    found = _read(folder)
    if found is None:
        _write(folder, make)
        found = _read(folder)
    if found is None:
        raise DataError(f"{folder}: the table of prepared data cannot be read back; check the disk, or data.cache=off")
    return found


def _read(folder: Path) -> tuple[Examples, About] | None:
    pa = _arrow(folder)
    try:
        about: About = json.loads((folder / ABOUT).read_bytes())
        if about["form"] != FORM or _digest(folder / TABLE) != about["table"]:
            return None
        mapped = pa.memory_map(str(folder / TABLE))
        reader = pa.ipc.open_file(mapped)
        blocks = [_block(reader.get_batch(i)) for i in range(reader.num_record_batches)]
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    return Examples(blocks, [tuple(x) for x in about["sources"]], about["classified"]), about


def _block(batch: Any) -> Block:
    """Views of a mapped batch: one row, whose columns are lists."""
    return Block(**{f.name: batch.column(f.name).values.to_numpy() for f in fields(Block)})


def _write(folder: Path, make: Callable[[Builder], About]) -> None:
    make_parents(folder)
    hidden = hidden_beside(folder)
    try:
        disk.make(hidden)
        with _writing(hidden / TABLE) as builder:
            said = make(builder)
            examples = builder.close()
        about = {
            **said,
            "form": FORM,
            "table": _digest(hidden / TABLE),
            "sources": examples.sources,
            "classified": examples.classified,
        }
        replace_file(hidden / ABOUT, json.dumps(about).encode())
        disk.sync(hidden)
        put(hidden, folder)
    finally:
        drop(hidden)


class _Written(Builder):
    """Writes each block as it is full."""

    def __init__(self, write: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__()
        self.write = write

    def put(self, block: Block) -> None:
        self.write({f.name: getattr(block, f.name) for f in fields(Block)})


@contextmanager
def _writing(path: Path) -> Iterator[Builder]:
    pa = _arrow(path)
    wide = ("ends", "run_ends", "lines")
    schema = pa.schema([(f.name, pa.list_(pa.int64() if f.name in wide else pa.int32())) for f in fields(Block)])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:

        def write(columns: Mapping[str, Any]) -> None:
            arrays = [
                pa.ListArray.from_arrays(pa.array([0, len(columns[f.name])], pa.int32()), pa.array(columns[f.name]))
                for f in schema
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))

        yield _Written(write)
    disk.sync(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtra("pyarrow", "data", f"the table of prepared data {path}") from error
    return pyarrow
