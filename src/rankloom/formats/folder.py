"""Writing a folder so that a reader sees the old one or the new one, never half of each."""

from __future__ import annotations

import ctypes
import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from rankloom.errors import FileError
from rankloom.formats.manifest import CARD, CONFIG, MANIFEST, WEIGHTS

PART = ".part"
STALE = 3600.0
"""Seconds after which a half-written folder counts as abandoned."""
OURS = (WEIGHTS, CARD, MANIFEST, CONFIG)


def write_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write an adapter into a hidden sibling of `target`, then put it in place; returns the real path.

    An adapter folder that is there already is exchanged in one step, and its other files stay; in a folder of other
    files the adapter's own are added, the config last. Raises `FileError` with the reason; `target` is then as before.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise FileError(f"{target} is a file; an adapter needs a folder")
    hidden = target.parent / f".{target.name}.{secrets.token_hex(4)}{PART}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        hidden.mkdir()
        fill(hidden)
        _finish(hidden)
        _put(hidden, target)
        _sync(target.parent)
    except OSError as error:
        raise FileError(f"{target}: cannot write the adapter: {error.strerror or error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return target


def _sweep(target: Path) -> None:
    """Remove what writers that were killed an hour ago or longer left beside `target`."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{PART}"):
        if time.time() - left.stat().st_mtime > STALE:
            shutil.rmtree(left, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """A new file with the mode that the umask gives."""
    with path.open("xb") as file:
        file.write(data)


def _finish(folder: Path) -> None:
    """Give every file the mode of a plainly written one (safetensors leaves 0600) and bring it to the disk."""
    mode = (folder / CONFIG).stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)
        _sync(path)
    _sync(folder)


def _put(hidden: Path, target: Path) -> None:
    if not target.exists():
        hidden.rename(target)
    elif (target / CONFIG).exists():
        for path in target.iterdir():
            if path.name not in OURS:
                _carry(path, hidden / path.name)
        _exchange(hidden, target)
    else:
        for name in OURS:
            if (hidden / name).exists():
                (hidden / name).replace(target / name)
        _sync(target)


def _carry(source: Path, copy: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, copy, symlinks=True, copy_function=_link)
    elif source.is_symlink():
        copy.symlink_to(source.readlink())
    else:
        _link(str(source), str(copy))


def _link(source: str, copy: str) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders: in one step where the system can, else by two renames."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    here, exchange = -100, 2
    if swap is not None and swap(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
        return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
