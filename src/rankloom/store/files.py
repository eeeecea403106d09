"""Packed weights as what safetensors can hold: plain tensors `name.part`, and the stores' settings as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankloom.errors import FileError, SettingsError
from rankloom.settings import from_data, to_data
from rankloom.store.base import Packed, Store

KEY = "rankloom_stores"
"""Metadata key: a JSON object, weight name → store, shape, dtype."""


def to_files(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) for `safetensors.torch.save_file`: each packed weight becomes its parts, the rest stays.

    Raises `FileError` where a part's key is taken by another tensor.
    """
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, Packed):
            shape, dtype = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            about[name] = {"store": to_data(tensor.store, full=True), "shape": shape, "dtype": dtype}
            found = {f"{name}.{part}": value.detach().contiguous() for part, value in tensor.parts.items()}
        else:
            found = {name: tensor.detach().contiguous()}
        for key, value in found.items():
            if key in tensors:
                raise FileError(f"two tensors would be written as {key!r}: one of them is a part of a packed weight")
            tensors[key] = value
    return tensors, {KEY: json.dumps(about, sort_keys=True)} if about else {}


def from_files(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Tensor]:
    """The state dict that `to_files` was given. Raises `FileError` for parts that are missing or do not fit."""
    left = dict(tensors)
    packed = {name: _packed(name, about, left) for name, about in _about(metadata).items()}
    for name in packed.keys() & left.keys():
        raise FileError(f"{name!r} is in the file both packed and as a plain tensor")
    return left | packed


def _about(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(KEY, "{}")
    try:
        about = json.loads(text)
    except ValueError as error:
        raise FileError(f"metadata {KEY!r} is no JSON: {error}") from error
    if not isinstance(about, dict):
        raise FileError(f"metadata {KEY!r}: expected an object of weight names, got {text[:80]!r}")
    return about


def packed_shapes(metadata: Mapping[str, str] | None) -> dict[str, tuple[Store, torch.Size, torch.dtype]]:
    """Store, shape and dtype of every weight that the metadata calls packed. Raises `FileError` for odd metadata."""
    return {name: _described(name, about) for name, about in _about(metadata).items()}


def packed_keys(metadata: Mapping[str, str] | None) -> dict[str, tuple[str, ...]]:
    """The tensors that each packed weight lies in."""
    return {
        name: tuple(f"{name}.{part}" for part in store.encode(torch.empty(shape, dtype=dtype, device="meta")))
        for name, (store, shape, dtype) in packed_shapes(metadata).items()
    }


def metadata_of(name: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of one packed weight alone."""
    return {KEY: json.dumps({name: _about(metadata)[name]})}


def _described(name: str, about: Any) -> tuple[Store, torch.Size, torch.dtype]:
    if not isinstance(about, dict) or about.keys() != {"store", "shape", "dtype"}:
        raise FileError(f"metadata of {name!r}: expected store, shape and dtype, got {about!r}")
    try:
        store = from_data(Store, about["store"], f"store of {name!r}")
    except SettingsError as error:
        raise FileError(f"metadata of {name!r}: {error}") from error
    return store, _shape(name, about["shape"]), _dtype(name, about["dtype"])


def _packed(name: str, about: Any, tensors: dict[str, Tensor]) -> Packed:
    """Take the parts of `name` out of `tensors`, checked against what the store makes of such a weight."""
    store, shape, dtype = _described(name, about)
    try:
        wanted = store.encode(torch.empty(shape, dtype=dtype, device="meta"))
    except SettingsError as error:
        raise FileError(f"metadata of {name!r}: {error}") from error
    parts = {}
    for part, like in wanted.items():
        value = tensors.pop(f"{name}.{part}", None)
        if value is None:
            raise FileError(f"the file has no tensor '{name}.{part}', which {store} needs")
        if value.shape != like.shape or value.dtype != _part_dtype(like, value):
            raise FileError(
                f"'{name}.{part}' is {tuple(value.shape)} {value.dtype}; {store} of a {tuple(shape)} weight has "
                f"{tuple(like.shape)} {like.dtype}"
            )
        parts[part] = value
    return Packed(parts, store, shape, dtype)


def _part_dtype(like: Tensor, value: Tensor) -> torch.dtype:
    """What the part may be: float32 parts stay float64 when the weight was packed in float64 and narrowed later."""
    return value.dtype if {like.dtype, value.dtype} == {torch.float32, torch.float64} else like.dtype


def _shape(name: str, value: Any) -> torch.Size:
    if not isinstance(value, list) or not value or any(type(n) is not int or n < 1 for n in value):
        raise FileError(f"metadata of {name!r}: shape {value!r} is no list of positive sizes")
    return torch.Size(value)


def _dtype(name: str, value: Any) -> torch.dtype:
    dtypes = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if value not in dtypes:
        raise FileError(f"metadata of {name!r}: dtype {value!r} is not one of {', '.join(dtypes)}")
    return dtypes[value]
