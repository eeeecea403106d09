"""Every operation that changes the disk. All go through `_do`, so a watcher can log them, or make them fail."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

HERE, EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2."""


@dataclass(frozen=True)
class Operation:
    """One change of the disk: `kind` is the function's name here; `to`: the second path; `data`: the bytes written."""

    kind: str
    path: Path
    to: Path | None = None
    data: bytes = b""


Watcher = Callable[[Operation, Callable[[], None]], None]
"""Gets each operation and what performs it, and may perform it, note it, or raise `OSError` in its place."""

_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, in this thread or task, every operation goes through `watcher`."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def write(path: Path, data: bytes) -> None:
    """A new file with the mode that the umask gives. Raises `FileExistsError` if it is there."""
    _do(Operation("write", path, data=data), lambda: _put(path, "xb", data))


def append(path: Path, data: bytes) -> None:
    """Bytes at the end of a file, which is made if it is not there."""
    _do(Operation("append", path, data=data), lambda: _put(path, "ab", data))


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk; folders where the system can."""
    _do(Operation("sync", path), lambda: _sync(path))


def make(folder: Path) -> None:
    """A new folder."""
    _do(Operation("make", folder), folder.mkdir)


def rename(path: Path, to: Path) -> None:
    """Give a file or folder another name; a file of that name is replaced."""
    _do(Operation("rename", path, to), lambda: os.replace(path, to))


def exchange(path: Path, to: Path) -> None:
    """Swap two folders: in one step where the system can, else by renames."""
    _do(Operation("exchange", path, to), lambda: _exchange(path, to))


def copy(path: Path, to: Path) -> None:
    """A file, link or folder under a second name: hard links where the system can; links stay links."""
    _do(Operation("copy", path, to), lambda: _copy(path, to))


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    _do(Operation("remove", path), lambda: _remove(path))


def _do(operation: Operation, perform: Callable[[], None]) -> None:
    watcher = _watcher.get()
    try:
        if watcher is None:
            perform()
        else:
            watcher(operation, perform)
    except OSError as error:
        if error.filename is None:  # a full disk does not say where
            error.filename = str(operation.path)
        raise


def _put(path: Path, mode: str, data: bytes) -> None:
    with path.open(mode) as file:
        file.write(data)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(new: Path, old: Path) -> None:
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if swap is not None and swap(HERE, os.fsencode(new), HERE, os.fsencode(old), EXCHANGE) == 0:
        return
    aside = new.with_name(f"{new.name}.old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _copy(path: Path, to: Path) -> None:
    if path.is_symlink():
        to.symlink_to(path.readlink())
    elif path.is_dir():
        shutil.copytree(path, to, symlinks=True, copy_function=_link)
    else:
        _link(str(path), str(to))


def _link(source: str, copy: str) -> None:
    try:
        os.link(source, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, copy)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
