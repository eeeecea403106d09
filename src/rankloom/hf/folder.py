"""A model's folder that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rankloom.files import disk
from rankloom.files.folders import bring_up, drop, fixed, hidden_beside, hidden_in, make_parents, put, real, writing

LAST = "config.json"
"""What makes a folder a model."""


@contextmanager
def model_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to fill; at the end of the block it is forced to disk and becomes `out`.

    Where `out` cannot be exchanged for another folder (`fixed`), the hidden one lies in it, and its files come up.
    """
    out = real(out)
    inside = out.is_dir() and fixed(out)
    hidden = hidden_in(out) if inside else hidden_beside(out)
    with writing(out):
        try:
            make_parents(hidden)
            disk.make(hidden)
            yield hidden
            _sync(hidden)
            if inside:
                bring_up(hidden, sorted(os.listdir(hidden), key=lambda name: name == LAST))
            else:
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
