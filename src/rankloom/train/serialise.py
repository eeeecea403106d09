"""Nested state as JSON plus tensors, and back: what a checkpoint writes instead of a pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankloom.errors import FileError, StateError


def pack(value: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """`value` in JSON form; its tensors go to `tensors` (on the CPU, under their path). Tuples, keys that are no
    strings and non-finite numbers come back as they were. Raises `StateError` for what is neither.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"$tensor": path, "$cpu": value.device.type == "cpu"}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [pack(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: pack(v, tensors, f"{path}/{k}") for k, v in value.items()}
        return {"$pairs": [pack([k, v], tensors, f"{path}/{i}") for i, (k, v) in enumerate(value.items())]}
    raise StateError(
        f"{path.lstrip('/')} is a {type(value).__name__}, which a checkpoint cannot hold: give tensors, numbers, "
        "strings, lists or dicts of them in Rule.state()"
    )


def unpack(data: Any, tensors: Mapping[str, Tensor], device: torch.device, keep_cpu: bool) -> Any:
    """What `pack` was given. Tensors go to `device`; with `keep_cpu` those that were on the CPU stay there."""
    if isinstance(data, list):
        return [unpack(v, tensors, device, keep_cpu) for v in data]
    if not isinstance(data, dict):
        return data
    if "$tensor" in data:
        if data["$tensor"] not in tensors:
            raise FileError(f"the checkpoint has no tensor {data['$tensor']!r}")
        tensor = tensors[data["$tensor"]]
        return tensor if keep_cpu and data["$cpu"] else tensor.to(device)
    if "$float" in data:
        return float(data["$float"])
    if "$tuple" in data:
        return tuple(unpack(v, tensors, device, keep_cpu) for v in data["$tuple"])
    if "$pairs" in data:
        return dict(tuple(unpack(pair, tensors, device, keep_cpu)) for pair in data["$pairs"])
    return {k: unpack(v, tensors, device, keep_cpu) for k, v in data.items()}
