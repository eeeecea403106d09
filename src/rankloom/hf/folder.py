"""A model's folder that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankloom.errors import FileError
from rankloom.train.folder import sync_folder


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
    hidden = out.absolute().parent / f".{out.name}.{secrets.token_hex(4)}.part"
    with writing(out):
        try:
            hidden.mkdir(parents=True)
            yield hidden
            _sync(hidden)
            if out.exists():
                out.rmdir()
            os.rename(hidden, out)
            sync_folder(out.absolute().parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def folder_size(folder: Path) -> int:
    """Bytes of all files below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
            continue
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
