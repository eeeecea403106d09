"""From the name of a source to its rows: a file, a folder, `microworld:task`, or a Hugging Face data set id."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rankloom.errors import DataError, SettingsError, suggest
from rankloom.train.data.detect import as_rows
from rankloom.train.data.lazy import Chained, Picked
from rankloom.train.data.order import draw
from rankloom.train.data.read import READERS, read_file
from rankloom.train.data.records import Listed, Row, Rows, Where, fault, fingerprint

SPLITS = {"train": ("train",), "validation": ("valid", "validation", "val", "dev", "eval"), "test": ("test",)}
MICROWORLD = "microworld:"
MICROWORLD_DEFAULT = 1000
HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.+-]+))?")

Source = str | Path | Iterable[Mapping[str, Any]]


class Chosen(Rows):
    """Some of the rows of several files."""

    def __init__(self, files: Sequence[Rows], indices: Sequence[int] | np.ndarray[Any, Any] | None = None) -> None:
        self.files, self.indices = files, indices
        rows: Sequence[Row] = files[0] if len(files) == 1 else Chained(files)
        self.rows = rows if indices is None else Picked(rows, indices)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: int) -> Row:
        found: Row = self.rows[index]
        return found

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def digest(self) -> str:
        chosen = b"" if self.indices is None else np.asarray(self.indices, dtype=np.int64).tobytes()
        return fingerprint(*(file.digest() for file in self.files), chosen)


def rows_of(source: Source, split: str, seed: int) -> tuple[Rows, str, tuple[str, ...] | None]:
    """(rows, the name of the source, class names if the source knows them)."""
    if not isinstance(source, (str, Path)):
        return Listed(as_rows(source, "records")), "records", None
    name = str(source)
    path = Path(name).expanduser()
    if path.exists():
        return _path(path, split), name, None
    base, count = _counted(name)
    if base.startswith(MICROWORLD):
        return _microworld(base, split, count, seed), name, None
    path = Path(base).expanduser()
    if path.exists():
        return _some(_path(path, split), count, seed, name), name, None
    match = HUB_ID.fullmatch(base)
    if path.suffix.lower() in READERS or match is None:
        there = [x.name for x in path.parent.iterdir()] if path.parent.is_dir() else []
        raise fault(name, f"no such file or folder{suggest(path.name, there)}", "check the path")
    rows, names = import_module("rankloom.hf.datasets").read(match["id"], match["subset"], split, count, seed)
    return rows, name, names


def _counted(name: str) -> tuple[str, int | None]:
    base, mark, tail = name.rpartition("#")
    if not mark:
        return name, None
    if not tail.isdecimal() or int(tail) == 0:
        raise SettingsError(f"{name!r}: behind '#' belongs how many records to draw, as in {base}#500")
    return base, int(tail)


def _some(rows: Rows, count: int | None, seed: int, name: str) -> Rows:
    if count is None:
        return rows
    if count > len(rows):
        raise fault(name, f"{count} records are asked for, there are {len(rows)}", f"ask for at most #{len(rows)}")
    return Chosen([rows], draw(len(rows), count, seed))


def _path(path: Path, split: str) -> Rows:
    if path.is_dir():
        files = [read_file(file) for file in folder(path, split)]
        return files[0] if len(files) == 1 else Chosen(files)
    if split != "train" and not _belongs(path, split):
        raise fault(
            str(path),
            f"a single file has no split {split!r}",
            "give a folder with one file per split, a file of its own, or hold records out with Records.divide",
        )
    return read_file(path)


def folder(path: Path, split: str) -> list[Path]:
    """The data files of one split in a folder: `train.jsonl`, `valid-0001.parquet`, `test/…`; all of one suffix."""
    mine = [x for x in sorted(path.iterdir()) if _belongs(x, split) and not x.name.startswith(".")]
    files = [y for x in mine for y in (sorted(x.iterdir()) if x.is_dir() else [x]) if y.suffix.lower() in READERS]
    if not files:
        there = ", ".join(sorted(x.name for x in path.iterdir())[:8]) or "nothing"
        names = " or ".join(f"{prefix}*" for prefix in SPLITS.get(split, (split,)))
        raise fault(
            str(path), f"no data file for split {split!r} ({names}); there is {there}", "rename one, or name the file"
        )
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1:
        raise fault(str(path), f"split {split!r} comes as {' and as '.join(suffixes)}", "keep one kind")
    return files


def _belongs(path: Path, split: str) -> bool:
    word = re.match(r"[a-z]*", path.name.split(".")[0].lower())
    return word is not None and word[0] in SPLITS.get(split, (split,))


def _microworld(base: str, split: str, count: int | None, seed: int) -> Rows:
    task = base.removeprefix(MICROWORLD)
    if not task:
        raise DataError(f"{base!r} names no task; write microworld:task, or microworld:task#500")
    n = count or MICROWORLD_DEFAULT
    try:
        found = import_module("rankloom.microworld").examples(task, split, n, seed)
    except DataError as error:
        raise DataError(f"{base}#{n}: {error}; write that number behind '#', as in {base}#{min(n, 50)}") from error
    return Listed([Row(fields, Where(f"{base}[{split}]", n, "example")) for n, fields in enumerate(found, 1)])
