"""A layer's weight as the model's code sees it that reads it without calling the layer: with the active changes.

Kernels for whole blocks (attention, state-space models, PyTorch's encoder layers in evaluation) take `layer.weight`
past the layer's forward. Most code that reads a weight only wants its dtype or device, so the sum is made when
something is computed with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

PLAIN = (Tensor, nn.Parameter)
VIEWS = {"T", "mT", "H", "mH", "real", "imag"}
"""Attributes of a tensor that are values."""
WRITES = {f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")}
LOOKS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "data_ptr", "untyped_storage"),
    *("storage", "_typed_storage", "element_size", "is_floating_point", "is_complex", "is_contiguous", "get_device"),
    *("is_inference", "is_shared", "is_signed", "__len__", "__hash__", "is_same_size", "__reduce_ex__", "__dir__"),
}
"""Functions that look at a tensor and not at its values."""


class Read(nn.Parameter):
    """Stands for the `frozen` parameter of a layer, plain or packed, to whoever only looks or writes in place;
    `changed()` is what whoever computes with it gets.
    """

    frozen: Tensor
    changed: Callable[[], Tensor]

    def __new__(cls, frozen: Tensor, changed: Callable[[], Tensor]) -> Read:
        alias = frozen.detach() if type(frozen) in PLAIN else torch.empty(0, dtype=frozen.dtype, device=frozen.device)
        made: Read = torch.Tensor._make_subclass(cls, alias, False)
        made.frozen, made.changed = frozen, changed
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "__get__":
            looks = getattr(func.__self__, "__name__", "") not in VIEWS
        else:
            looks = name in LOOKS or name == "__set__"
        if looks:
            return func(*_frozen(args), **_frozen(kwargs))
        if name in WRITES or (name.endswith("_") and not name.endswith("__")):  # in place, into the frozen one
            into = {key: _frozen(v) if key in ("tensor", "input", "self") else _summed(v) for key, v in kwargs.items()}
            return func(*_frozen(args[:1]), *_summed(args[1:]), **into)
        return func(*_summed(args), **_summed(kwargs))


def _frozen(values: Any) -> Any:
    return pytree.tree_map(lambda value: value.frozen if isinstance(value, Read) else value, values)


def _summed(values: Any) -> Any:
    made: dict[int, Tensor] = {}

    def one(value: Any) -> Any:
        if not isinstance(value, Read):
            return value
        if id(value) not in made:
            made[id(value)] = value.changed()
        return made[id(value)]

    return pytree.tree_map(one, values)
