"""One run in a folder: a lock of the system, which ends with the process that holds it, and who that is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rankloom.errors import FileError, StateError
from rankloom.files import disk
from rankloom.files.folders import drop, make_parents, real, writing

if TYPE_CHECKING:
    from filelock import FileLock

LOCK, OWNER = ".lock", ".lock.owner"
_LOCKLESS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep `folder`, which is made if it is not there, for this thread; it may lock it again inside.

    A process that is killed leaves nothing locked. On a file system without locks a warning is all there is. Raises
    `StateError` naming host and process of whoever has it, `FileError` where nothing can be written.
    """
    from filelock import FileLock

    folder = real(folder)
    with writing(folder):
        make_parents(folder / LOCK)
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    if lock.is_locked or not _taken(lock, folder):
        yield
        return
    try:
        with writing(folder):
            disk.remove(folder / OWNER)
            disk.write(folder / OWNER, json.dumps(_me()).encode())
        yield
    finally:
        drop(folder / OWNER)
        lock.release()


def _taken(lock: FileLock, folder: Path) -> bool:
    """Take the lock; False where the file system has none."""
    from filelock import Timeout

    try:
        lock.acquire()
    except Timeout:
        raise StateError(
            f"{folder} is in use by {_owner(folder)}: wait for that run to end or stop it, or give another out="
        ) from None
    except OSError as error:
        if error.errno not in _LOCKLESS:
            raise FileError(f"{folder / LOCK}: cannot be locked: {error.strerror or error}") from error
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): see to it that no other run writes there", stacklevel=5
        )
        return False
    return True


def check_free(folder: Path) -> None:
    """Refuse a folder that another run has locked, as `locked` does; nothing is made."""
    if (folder / LOCK).exists():
        with locked(folder):
            pass


def _me() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _owner(folder: Path) -> str:
    try:
        said = json.loads((folder / OWNER).read_bytes())
        return f"process {int(said['pid'])} on {said['host']!r} since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
