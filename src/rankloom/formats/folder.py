"""Putting an adapter's files where they belong: a folder of their own, an old adapter's, or one of other files."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path

from rankloom.errors import FileError
from rankloom.files.folders import add_files, fixed, real, sweep, write_folder
from rankloom.files.manifest import MANIFEST
from rankloom.formats.manifest import CARD, CONFIG, WEIGHTS

STALE = 3600.0
"""Seconds after which a half-written folder that nobody touches counts as abandoned."""
OURS = (MANIFEST, WEIGHTS, CARD, CONFIG)
"""In the order of writing: until all have come, what is there is not what the manifest says, or no adapter yet."""
IMMOVABLE = (errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system says of a folder that can be written to but not exchanged."""


def place(target: Path, files: Mapping[str, bytes]) -> Path:
    """Write an adapter's files as the folder `target`; returns the real path.

    An adapter folder that is there already is exchanged in one step, and its other files stay; the folder behind a link
    is, not the link. To a folder of other files the adapter's own are added, the config last; so they are to a folder
    that cannot be exchanged (`fixed`): killed between two files of an old and a new adapter, it is refused by `load`.
    Raises `FileError` with the reason; `target` is then as before.
    """
    target = real(target)
    if target.exists() and not target.is_dir():
        raise FileError(f"{target} is a file; an adapter needs a folder")
    ordered = {name: files[name] for name in OURS}
    try:
        for parent in (target.parent, target):
            sweep(parent, target.name, STALE)
        if target.exists() and (not (target / CONFIG).exists() or fixed(target)):
            add_files(target, ordered)
        else:
            _exchange(target, ordered)
    except OSError as error:
        raise FileError(f"{target}: cannot write the adapter: {error.strerror or error}") from error
    return target


def _exchange(target: Path, files: Mapping[str, bytes]) -> None:
    try:
        write_folder(target, files, _others(target))
    except OSError as error:
        if error.errno not in IMMOVABLE or not target.is_dir():
            raise
        add_files(target, files)


def _others(target: Path) -> list[Path]:
    return [path for path in target.iterdir() if path.name not in OURS] if target.exists() else []
