"""The safetensors format, read by ourselves: a header that is checked in full, and tensors as views of one buffer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankloom.errors import FileError
from rankloom.files.strict import parse
from rankloom.formats.limits import Limits

LENGTH = 8
"""Bytes of the number before the header."""
FIELDS = {"dtype", "shape", "data_offsets"}
LARGEST = 1 << 48
"""Largest size and offset."""
DTYPES = {
    "BOOL": (torch.bool, 1),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "F32": (torch.float32, 4),
    "F64": (torch.float64, 8),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
    "I32": (torch.int32, 4),
    "I64": (torch.int64, 8),
    "U8": (torch.uint8, 1),
}


class Header(NamedTuple):
    """What the weights file says of one tensor; `start`: first byte of its data, counted from the header's end."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0


def header_size(prefix: bytes, size: int, where: str, limits: Limits) -> int:
    """Bytes of the header of a file of `size` bytes that starts with `prefix`."""
    length = int.from_bytes(prefix, "little")
    if limits.header < length <= size - LENGTH:
        raise FileError(
            f"{where}: a header of {length} bytes; at most {limits.header} are read (limits=Limits(header={length}))"
        )
    if len(prefix) < LENGTH or LENGTH + length > size:
        raise FileError(f"{where}: no safetensors file: its header says {length} bytes, the file has {size}")
    return length


def read_header(raw: bytes, body: int, where: str, limits: Limits) -> dict[str, Header]:
    """The tensors that a header names; their data must fill the `body` bytes after it without gap or overlap."""
    if not raw.startswith(b"{"):
        raise FileError(f"{where}: no safetensors file: the header must start with '{{'")
    data = parse(raw, where, limits.depth)
    _check_metadata(data.pop("__metadata__", {}), where, limits)
    if len(data) > limits.tensors:
        raise FileError(
            f"{where}: {len(data)} tensors; at most {limits.tensors} are read (limits=Limits(tensors={len(data)}))"
        )
    found, spans = {}, []
    for key, said in data.items():
        found[key], span = _entry(where, key, said)
        spans.append((*span, key))
    end = 0
    for start, stop, key in sorted(spans):
        if start != end:
            raise FileError(f"{where}: tensor {key!r}: its data overlap or leave a gap at byte {end}")
        end = stop
    if end != body:
        raise FileError(f"{where}: the header names {end} bytes of data, the file has {body}")
    return found


def tensors_in(header: Mapping[str, Header], body: Tensor) -> dict[str, Tensor]:
    """The tensors as views of `body`, the uint8 bytes after the header; a copy where a view would not be aligned."""
    found = {}
    for key, said in header.items():
        size = math.prod(said.shape) * said.dtype.itemsize
        raw = body[said.start : said.start + size]
        aligned = raw if raw.storage_offset() % said.dtype.itemsize == 0 else raw.clone()
        found[key] = aligned.view(said.dtype).reshape(said.shape)
    return found


def _check_metadata(metadata: Any, where: str, limits: Limits) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{where}: __metadata__ is no object of texts")
    size = sum(len(k) + len(v) for k, v in metadata.items())
    if size > limits.metadata:
        raise FileError(f"{where}: __metadata__ has {size} characters; at most {limits.metadata}")


def _entry(where: str, key: str, said: Any) -> tuple[Header, tuple[int, int]]:
    if not isinstance(said, dict) or said.keys() != FIELDS:
        raise FileError(f"{where}: the header of tensor {key!r} is not dtype, shape and data_offsets")
    if not isinstance(said["dtype"], str) or said["dtype"] not in DTYPES:
        raise FileError(f"{where}: tensor {key!r} has dtype {said['dtype']!r}; known: {', '.join(DTYPES)}")
    dtype, size = DTYPES[said["dtype"]]
    shape, offsets = said["shape"], said["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise FileError(f"{where}: tensor {key!r} has shape {shape!r} and offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * size:
        raise FileError(f"{where}: tensor {key!r} of shape {shape} takes {offsets[1] - offsets[0]} bytes")
    return Header(dtype, tuple(shape), offsets[0]), (offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(type(n) is int and 0 <= n < LARGEST for n in value)
