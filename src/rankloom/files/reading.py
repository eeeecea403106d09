"""Reading files of a folder: relative to its handle, each once, and only plain files that lie in it.

A link is followed only inside the folder, or from a hub cache's `snapshots/…` into the same repository's `blobs`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rankloom.errors import FileError

_FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class Folder:
    """An open folder. `path` is for messages; what is read comes from the folder that was there when it was opened."""

    def __init__(self, path: Path, handle: int | None) -> None:
        self.path = path
        self._handle = handle

    def names(self) -> list[str]:
        """What is in it, sorted."""
        return sorted(os.listdir(self.path if self._handle is None else self._handle))

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name, whatever it is."""
        try:
            os.stat(self._at(name), dir_fd=self._handle, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def replaced(self) -> bool:
        """Whether another folder is at `path` by now."""
        if self._handle is None:
            return False
        try:
            return not os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except FileNotFoundError:
            return True

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[File]:
        """One plain file of the folder. Raises `FileError` for anything else, without waiting for it."""
        where = self.path / name
        try:
            handle = os.open(self._at(name), _FLAGS | _NO_LINK, dir_fd=self._handle)
        except FileNotFoundError as error:
            raise FileError(f"{where}: no such file") from error
        except OSError as error:
            if not where.is_symlink():
                raise FileError(f"{where}: cannot be opened: {error.strerror}") from error
            handle = self._through_link(where)
        try:
            yield _plain(where, handle)
        finally:
            os.close(handle)

    def read(self, name: str, limit: int) -> bytes:
        """All bytes of a file of at most `limit` bytes."""
        with self.opened(name) as file:
            return file.all(limit)

    def _at(self, name: str) -> str | Path:
        return name if self._handle is not None else self.path / name

    def _through_link(self, where: Path) -> int:
        """Open what a link leads to, if that lies in the folder or in the blobs of the same hub repository."""
        try:
            real, home = where.resolve(strict=True), self.path.resolve()
        except (OSError, RuntimeError) as error:
            raise FileError(f"{where} is a link to nothing: {error}") from error
        caches = [up.parent / "blobs" for up in home.parents if up.name == "snapshots"]
        if not any(real.is_relative_to(place) for place in (home, *caches)):
            raise FileError(f"{where} is a link that leaves the folder (to {real}); copy the file instead")
        try:
            handle = os.open(real, _FLAGS | _NO_LINK)
        except OSError as error:
            raise FileError(f"{where}: cannot be opened: {error.strerror}") from error
        if _name_of(handle) not in (None, str(real)):
            os.close(handle)
            raise FileError(f"{where} was changed while it was opened")
        return handle


class File:
    """An open plain file: its path for messages and its size."""

    def __init__(self, path: Path, size: int, handle: int) -> None:
        self.path = path
        self.size = size
        self._handle = handle

    def all(self, limit: int) -> bytes:
        """All its bytes. Raises `FileError` for more than `limit`."""
        if self.size > limit:
            raise FileError(f"{self.path}: {self.size} bytes; at most {limit} are read")
        return self.take(self.size)

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises `FileError` if the file ends before."""
        buffer = bytearray(count)
        self.take_into(memoryview(buffer))
        return bytes(buffer)

    def take_into(self, buffer: memoryview) -> None:
        """Fill `buffer` with the next bytes."""
        done = 0
        while done < len(buffer):
            part = os.readv(self._handle, [buffer[done : done + (1 << 30)]])
            if not part:
                raise FileError(f"{self.path}: ended after {done} of {len(buffer)} bytes; it was changed while read")
            done += part


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Folder]:
    """An open folder. Raises `FileError` if there is none."""
    if os.open not in os.supports_dir_fd:
        if not path.is_dir():
            raise FileError(f"{path}: no such folder")
        yield Folder(path, None)
        return
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise FileError(f"{path}: no folder that can be read: {error.strerror}") from error
    try:
        yield Folder(path, handle)
    finally:
        os.close(handle)


def plain_file(path: Path, limit: int) -> bytes:
    """All bytes of one plain file, or of what a link leads to, of at most `limit` bytes.

    Raises `FileError` for anything else, without waiting for it.
    """
    try:
        handle = os.open(path, _FLAGS)
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    try:
        return _plain(path, handle).all(limit)
    finally:
        os.close(handle)


def _plain(path: Path, handle: int) -> File:
    entry = os.fstat(handle)
    if not stat.S_ISREG(entry.st_mode):
        raise FileError(f"{path} is no regular file")
    return File(path, entry.st_size, handle)


def _name_of(handle: int) -> str | None:
    """The real name of an open file, where the system can say."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return None
