"""Immutable folders: written beside their place, synced, and put there in one step.

Whatever kills the writer, a reader finds the old folder or the new one, never half of each. A link to a folder stays,
and the folder behind it is replaced. A folder that must stay itself (`fixed`) is filled in place, file by file.
"""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
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
    target = real(target)
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
    """Put files into a folder that stays what it is, each in one step, in this order."""
    hidden = hidden_in(folder)
    try:
        disk.make(hidden)
        _fill(hidden, files)
        disk.sync(hidden)
        bring_up(hidden, files)
    finally:
        drop(hidden)


def bring_up(hidden: Path, names: Iterable[str]) -> None:
    """Rename what a finished hidden folder holds into the folder that it lies in, in this order."""
    for name in names:
        disk.rename(hidden / name, hidden.parent / name)
    disk.sync(hidden.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path` in one step."""
    path = real(path)
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
    """Remove what writers of `name` (any) left behind in `parent`, and have not touched for `age` seconds."""
    escaped = name if name == "*" else glob.escape(name)
    for left in parent.glob(f".{escaped}.*{PART}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - _touched(left) >= age:
                drop(left)


def _touched(path: Path) -> float:
    """When it, or anything in it, was written to last."""
    return max(found.lstat().st_mtime for found in (path, *path.rglob("*")))


def real(path: Path) -> Path:
    """Where a path leads, links followed; the last part need not exist."""
    return Path(os.path.realpath(path))


def fixed(folder: Path) -> bool:
    """Whether a folder that is there (its real path) cannot be exchanged for another: something is mounted at it, this
    process stands in it, or the folder above cannot be written.
    """
    with contextlib.suppress(FileNotFoundError):
        if Path.cwd().is_relative_to(folder):
            return True
    return os.path.ismount(folder) or folder in _mounts() or not os.access(folder.parent, os.W_OK | os.X_OK)


def _mounts() -> Iterator[Path]:
    """What Linux says is mounted: folders of the same file system among it, which `ismount` does not know."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        yield Path(os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1")))


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the system says about writing, as one message: no space, no permission."""
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or out
        raise FileError(
            f"{place}: cannot be written: {error.strerror or error}; free space, or give another out="
        ) from error


def hidden_beside(target: Path) -> Path:
    """A name for what is being written, that no reader takes for the target."""
    return target.parent / f".{target.name}.{secrets.token_hex(4)}{PART}"


def hidden_in(folder: Path) -> Path:
    """The same, inside a folder that is not replaced."""
    return folder / f".{folder.name}.{secrets.token_hex(4)}{PART}"


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
