"""Immutable folders: written beside their place, synced, sealed by a manifest, and renamed in one step.

Whatever kills the writer, a reader finds the whole folder or none: `verify` tells one from the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankloom.errors import FileError

MANIFEST = "manifest.json"
SCHEMA = 1
LIMIT = 4 << 20
"""Largest manifest that is read, in bytes."""


def write_folder(target: Path, files: Mapping[str, bytes], about: Mapping[str, Any]) -> None:
    """Make `target` with these files and a manifest of their sizes and SHA-256; a folder in its place is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        hidden.chmod(0o777 & ~_umask())
        for name, data in files.items():
            write_synced(hidden / name, data)
        listed = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()}
        write_synced(hidden / MANIFEST, as_json({"schema": SCHEMA, **about, "files": listed}))
        sync_folder(hidden)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            os.rename(target, old / target.name)
        os.rename(hidden, target)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    sync_folder(target.parent)
    sweep(target.parent)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the verified content of every file in it. Raises `FileError` that names what is broken."""
    manifest = _manifest(folder)
    files = {}
    for name, entry in manifest["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise FileError(f"{path}: no such file, or not a plain one")
        size = path.stat().st_size
        if size != entry["size"]:
            raise FileError(f"{path}: {size} bytes, the manifest says {entry['size']}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise FileError(f"{path}: its SHA-256 is not the manifest's; the file was changed or damaged")
        files[name] = data
    return manifest, files


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise FileError(f"{path}: no such file; the folder was never finished")
    if path.stat().st_size > LIMIT:
        raise FileError(f"{path}: larger than {LIMIT} bytes")
    try:
        manifest = json.loads(path.read_bytes())
        entries = manifest["files"].items()
        sound = all(
            Path(n).name == n and isinstance(e["size"], int) and isinstance(e["sha256"], str) for n, e in entries
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: not a manifest ({type(error).__name__}: {error})") from error
    if not sound or manifest.get("schema") != SCHEMA:
        raise FileError(f"{path}: schema {manifest.get('schema')!r} with odd file names; this version reads {SCHEMA}")
    return dict(manifest)


def sweep(parent: Path) -> None:
    """Remove what an interrupted writer left behind in `parent`."""
    for left in (*parent.glob(".*.new-*"), *parent.glob(".*.old-*")):
        shutil.rmtree(left, ignore_errors=True)


def as_json(value: Any) -> bytes:
    """Strict JSON: no NaN."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False).encode()


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.new")
    try:
        write_synced(hidden, data)
        os.replace(hidden, path)
    except BaseException:
        hidden.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write and force to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
