"""Immutable folders: written beside their place, synced, and put there in one step.

Whatever kills the writer, a reader finds the old folder or the new one, never half of each.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankloom.errors import FileError
from rankloom.files import disk
from rankloom.files.manifest import LIMIT, MANIFEST, check_file, read_manifest
from rankloom.files.reading import opened

PART = ".part"
FILE_LIMIT = 1 << 40
"""Largest file of a sealed folder that is read, in bytes."""


def write_folder(target: Path, files: Mapping[str, bytes], beside: Iterable[Path] = ()) -> None:
    """Make `target` with these files, and `beside` under their own names; a folder in its place is exchanged."""
    make_parents(target)
    hidden = hidden_beside(target)
    try:
        disk.make(hidden)
        _fill(hidden, files)
        for path in beside:
            disk.copy(path, hidden / path.name)
        disk.sync(hidden)
        put(hidden, target)
    finally:
        drop(hidden)


def put(hidden: Path, target: Path) -> None:
    """Bring a finished hidden folder to its place; the folder that was there is then the hidden one."""
    if target.exists():
        disk.exchange(hidden, target)
    else:
        disk.rename(hidden, target)
    disk.sync(target.parent)


def add_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files into a folder that holds others, each in one step, in this order."""
    hidden = hidden_beside(folder)
    try:
        disk.make(hidden)
        _fill(hidden, files)
        for name in files:
            disk.rename(hidden / name, folder / name)
        disk.sync(folder)
    finally:
        drop(hidden)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path` in one step."""
    make_parents(path)
    hidden = hidden_beside(path)
    try:
        _fill(hidden.parent, {hidden.name: data})
        disk.rename(hidden, path)
        disk.sync(path.parent)
    finally:
        drop(hidden)


def read_folder(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the verified content of every file in it. Raises `FileError` that names what is broken."""
    with opened(folder) as found:
        where = str(folder / MANIFEST)
        if not found.has(MANIFEST):
            raise FileError(f"{where}: no such file; the folder was never finished")
        manifest = read_manifest(found.read(MANIFEST, LIMIT), where, kind)
        if manifest is None:
            raise FileError(f"{where}: not a manifest of {kind!r}")
        files = {name: found.read(name, FILE_LIMIT) for name in manifest["files"]}
    for name, said in manifest["files"].items():
        check_file(files[name], said, str(folder / name))
    return manifest, files


def discard(folder: Path) -> None:
    """Remove a folder so that no reader finds half of it: first its name, then its content."""
    hidden = hidden_beside(folder)
    disk.rename(folder, hidden)
    disk.sync(folder.parent)
    drop(hidden)


def sweep(parent: Path, name: str = "*", age: float = 0.0) -> None:
    """Remove what writers of `name` (any) that were killed at least `age` seconds ago left behind in `parent`."""
    escaped = name if name == "*" else glob.escape(name)
    for left in parent.glob(f".{escaped}.*{PART}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.lstat().st_mtime >= age:
                drop(left)


def hidden_beside(target: Path) -> Path:
    """A name for what is being written, that no reader takes for the target."""
    return target.parent / f".{target.name}.{secrets.token_hex(4)}{PART}"


def drop(path: Path) -> None:
    """Remove a leftover; what cannot be removed is swept later."""
    with contextlib.suppress(OSError):
        disk.remove(path)


def make_parents(target: Path) -> None:
    """Make the missing folders above `target`, each brought to the disk."""
    missing = [p for p in Path(os.path.abspath(target)).parents if not p.exists()]
    for folder in reversed(missing):
        with contextlib.suppress(FileExistsError):
            disk.make(folder)
        disk.sync(folder.parent)


def _fill(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        disk.write(folder / name, data)
        disk.sync(folder / name)
