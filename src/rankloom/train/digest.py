"""A short name for the content of a batch: what a resumed run compares to know that its data are the same."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST = 1 << 12
"""Values of one tensor or sequence that are looked at, evenly spread."""
UNKNOWN = "?"


def digest(*values: Any) -> str:
    """Of tensors, arrays, texts, numbers, and mappings, sequences and dataclasses of them, as 32 hex digits.

    Of anything else only its type counts; `opaque` tells.
    """
    found = _Hash()
    for value in values:
        _feed(value, found)
    return found.value.hexdigest() + (f"{UNKNOWN}{found.opaque}" if found.opaque else "")


def opaque(digest: str) -> str:
    """The type of something in there that could not be looked into; empty where there is nothing such."""
    return digest.partition(UNKNOWN)[2]


class _Hash:
    """A hash, and the last type that it could not look into."""

    def __init__(self) -> None:
        self.value = hashlib.blake2b(digest_size=16)
        self.opaque = ""

    def add(self, part: bytes) -> None:
        """With its length, so that no two sequences of parts are the same bytes."""
        self.value.update(b"%d:" % len(part) + part)


@functools.singledispatch
def _feed(value: Any, into: _Hash) -> None:
    if hasattr(value, "__array__") and hasattr(value, "tolist"):
        _array(value, into)
        return
    name = type(value).__name__
    into.add(name.encode())
    if dataclasses.is_dataclass(value):
        _feed([getattr(value, field.name) for field in dataclasses.fields(value)], into)
    else:
        into.opaque = name


def _array(value: Any, into: _Hash) -> None:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError):  # texts, objects, strides and byte orders that torch has not
        found = value.tolist()
    _feed(found, into)


@_feed.register
def _(value: Mapping, into: _Hash) -> None:  # type: ignore[type-arg]
    _feed(list(value), into)
    _feed(list(value.values()), into)


@_feed.register
def _(value: Sequence, into: _Hash) -> None:  # type: ignore[type-arg]
    into.add(b"%d values" % len(value))
    for i in range(0, len(value), -(-len(value) // MOST) or 1):
        _feed(value[i], into)


@_feed.register(str)
@_feed.register(int)
@_feed.register(float)
@_feed.register(complex)
@_feed.register(type(None))
def _(value: object, into: _Hash) -> None:
    into.add(repr(value).encode("utf-8", "surrogatepass"))


@_feed.register(bytes)
@_feed.register(bytearray)
def _(value: bytes | bytearray, into: _Hash) -> None:
    into.add(bytes(value))


@_feed.register
def _(value: Tensor, into: _Hash) -> None:
    into.add(f"{value.dtype}{tuple(value.shape)}".encode())
    if value.layout != torch.strided or value.is_meta:
        into.opaque = f"{value.layout} tensor"
        return
    flat = value.detach().reshape(-1)
    if flat.numel() > MOST:
        flat = flat[torch.linspace(0, flat.numel() - 1, MOST, dtype=torch.float64, device=flat.device).long()]
    into.add(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
