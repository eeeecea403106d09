"""A model's folder that appears whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankloom.errors import FileError
from rankloom.files import disk
from rankloom.files.folders import drop, hidden_beside, make_parents, put


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the system says about writing, as one message: no space, no permission."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{error.filename or out}: cannot be written: {error.strerror or error}; free space, or give another out="
        ) from error


@contextmanager
def model_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to fill; at the end of the block it is forced to disk and becomes `out`."""
    out = out.absolute()
    hidden = hidden_beside(out)
    with writing(out):
        try:
            make_parents(hidden)
            disk.make(hidden)
            yield hidden
            _sync(hidden)
            put(hidden, out)
        finally:
            drop(hidden)


def folder_size(folder: Path) -> int:
    """Bytes of all files below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        disk.sync(path)
    disk.sync(folder)
