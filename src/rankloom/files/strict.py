"""Strict JSON: one object, UTF-8, no key twice, no NaN or Infinity, not deeper than allowed."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from rankloom.errors import FileError

DEPTH = 12
_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_LONG = re.compile(rb"[0-9]{40}")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))


def as_json(data: Any) -> bytes:
    """Indented JSON with a last newline. Raises `ValueError` for NaN or infinite numbers."""
    return (json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def parse(raw: bytes, where: str, depth: int = DEPTH) -> dict[str, Any]:
    """The object in `raw`. Raises `FileError` naming `where`; nesting and digits are counted first."""
    _check_text(raw, where, depth)
    try:
        data = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=lambda items: _object(items, where),
            parse_constant=lambda literal: _no_number(literal, where),
            parse_float=lambda text: _finite(text, where),
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{where}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise FileError(f"{where}: expected a JSON object, got a {type(data).__name__}")
    return data


def _check_text(raw: bytes, where: str, most: int) -> None:
    outside = b"".join(_ESCAPED.sub(b"", raw).split(b'"')[::2])
    if long := _LONG.search(outside):
        _no_number(f"{long[0][:20].decode()}…", where)
    depth = 0
    for sign in outside.translate(None, _OTHERS):
        depth += 1 if sign in b"[{" else -1
        if depth > most:
            raise FileError(f"{where}: nested deeper than {most} levels")


def _object(items: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        seen: set[str] = set()
        twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise FileError(f"{where}: the key {twice!r} is there twice")
    return found


def _no_number(literal: str, where: str) -> Any:
    raise FileError(f"{where}: {literal} is no JSON number")


def _finite(text: str, where: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text[:40], where)
