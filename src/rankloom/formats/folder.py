"""Putting an adapter's files where they belong: a folder of their own, an old adapter's, or one of other files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from rankloom.errors import FileError
from rankloom.files.folders import add_files, sweep, write_folder
from rankloom.files.manifest import MANIFEST
from rankloom.formats.manifest import CARD, CONFIG, WEIGHTS

STALE = 3600.0
"""Seconds after which a half-written folder counts as abandoned."""
OURS = (WEIGHTS, CARD, MANIFEST, CONFIG)
"""In the order of writing: what makes a folder an adapter comes last."""


def place(target: Path, files: Mapping[str, bytes]) -> Path:
    """Write an adapter's files as the folder `target`; returns the real path.

    An adapter folder that is there already is exchanged in one step, and its other files stay; to a folder of other
    files the adapter's own are added, the config last. Raises `FileError` with the reason; `target` is then as before.
    """
    target = Path(os.path.abspath(target))
    if target.exists() and not target.is_dir():
        raise FileError(f"{target} is a file; an adapter needs a folder")
    ordered = {name: files[name] for name in OURS}
    try:
        sweep(target.parent, target.name, STALE)
        if target.exists() and not (target / CONFIG).exists():
            add_files(target, ordered)
        else:
            write_folder(target, ordered, _others(target))
    except OSError as error:
        raise FileError(f"{target}: cannot write the adapter: {error.strerror or error}") from error
    return target


def _others(target: Path) -> list[Path]:
    return [path for path in target.iterdir() if path.name not in OURS] if target.exists() else []
