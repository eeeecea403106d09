"""Weights that another library keeps in few bits: read as numbers, and kept the same way again.

A bridge is chosen by the name of a tensor's class, so none of these libraries is imported before such a tensor exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from rankloom.store.bridges import eightbit, fourbit, torchao


@dataclass(frozen=True)
class Bridge:
    """`read`: the dense weight of the logical shape; `repack`: a dense weight, kept as another one is; `stored`: the
    tensors that are held in its place, codes first; `count`: numbers in the weight.
    """

    library: str
    read: Callable[[Tensor], Tensor]
    repack: Callable[[Tensor, Tensor], Tensor]
    stored: Callable[[Tensor], list[Tensor]]
    count: Callable[[Tensor], int] = Tensor.numel


_INT8 = Bridge("bitsandbytes", eightbit.read, eightbit.repack, eightbit.stored)
_FOUR = Bridge("bitsandbytes", fourbit.read, fourbit.repack, fourbit.stored, fourbit.count)
_AO = Bridge("torchao", torchao.read, torchao.repack, torchao.stored)
_AO_NF4 = Bridge("torchao", torchao.read_nf4, torchao.repack_nf4, torchao.stored)
BRIDGES: dict[str, Bridge] = {
    "bitsandbytes.nn.modules.Int8Params": _INT8,
    "bitsandbytes.nn.modules.Params4bit": _FOUR,
    "torchao.utils.TorchAOBaseTensor": _AO,
    **dict.fromkeys(torchao.NF4, _AO_NF4),
}
"""Class of a tensor → its bridge; classes derived from it follow."""


def bridge_of(weight: Tensor) -> Bridge | None:
    """The bridge of `weight`, by class name along its bases; None for a tensor that is nobody else's."""
    return bridge_for(type(weight))


@cache
def bridge_for(cls: type[Tensor]) -> Bridge | None:
    """The bridge of tensors of a class."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
    return next((BRIDGES[name] for name in names if name in BRIDGES), None)
