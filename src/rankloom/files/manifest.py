"""The manifest of a folder: size and SHA-256 of its files, and a seal over the manifest's own bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from rankloom.errors import FileError
from rankloom.files.strict import as_json, parse

MANIFEST = "manifest.json"
SCHEMA = 2
LIMIT = 4 << 20
"""Largest manifest that is read, in bytes."""
_BLANK = "0" * 64


def sealed(files: Mapping[str, bytes], about: Mapping[str, Any]) -> dict[str, bytes]:
    """The files and, last, their manifest, which holds `about` (a `kind` among it) as well."""
    listed = {name: entry(data) for name, data in files.items()}
    raw = as_json({"schema": SCHEMA, **about, "files": listed, "seal": _BLANK})
    seal = hashlib.sha256(raw).hexdigest()
    return {**files, MANIFEST: raw.replace(_BLANK.encode(), seal.encode())}


def entry(data: bytes | bytearray) -> dict[str, Any]:
    """What the manifest says of a file."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_manifest(raw: bytes, where: str, *kinds: str) -> dict[str, Any] | None:
    """A manifest of one of these kinds; None for a file of somebody else. Raises `FileError` if it was changed."""
    data = parse(raw, where)
    if "seal" not in data and data.get("kind") not in kinds:
        return None
    seal = data.get("seal")
    blank = raw.replace(seal.encode(), _BLANK.encode()) if isinstance(seal, str) and len(seal) == 64 else b""
    if hashlib.sha256(blank).hexdigest() != seal:
        raise FileError(f"{where}: the seal is not that of its content: the file was changed or damaged")
    if data.get("kind") not in kinds or data.get("schema") != SCHEMA:
        raise FileError(
            f"{where}: a {data.get('kind')!r} of schema {data.get('schema')!r}; expected "
            f"{' or '.join(map(repr, kinds))}, schema {SCHEMA}"
        )
    if not _lists_files(data.get("files")):
        raise FileError(f"{where}: 'files' does not list names with size and sha256")
    return data


def check_file(data: bytes | bytearray, said: Mapping[str, Any], where: str) -> None:
    """Refuse content that is not what the manifest says."""
    found = entry(data)
    if found["size"] != said["size"]:
        raise FileError(f"{where}: {found['size']} bytes, the manifest says {said['size']}")
    if found != said:
        raise FileError(f"{where}: its SHA-256 is not the manifest's; the file was changed or damaged")


def _lists_files(files: Any) -> bool:
    return isinstance(files, dict) and all(
        isinstance(said, dict)
        and set(said) == {"size", "sha256"}
        and type(said["size"]) is int
        and isinstance(said["sha256"], str)
        and name not in ("", ".", "..", MANIFEST)
        and not set(name) & set("/\\\0")
        for name, said in files.items()
    )
