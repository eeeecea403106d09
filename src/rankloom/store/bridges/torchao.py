"""torchao's tensors: they know how to become dense, and have the logical shape and dtype already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rankloom.errors import StateError

NF4 = (
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor.NF4Tensor",
    "torchao.dtypes.nf4tensor.NF4Tensor",
)
"""Where torchao has had its NF4 tensor."""


def read(weight: Any) -> Tensor:
    """The dense weight of the same shape and dtype."""
    dense: Tensor = weight.dequantize()
    return dense.to(weight.dtype)


def read_nf4(weight: Any) -> Tensor:
    """The dense weight of the same shape and dtype."""
    dense: Tensor = weight.get_original_weight()
    return dense.to(weight.dtype)


def stored(weight: Any) -> list[Tensor]:
    """The inner tensors."""
    names, _ = weight.__tensor_flatten__()
    inner = [getattr(weight, name) for name in names]
    return [leaf for part in inner for leaf in (stored(part) if hasattr(part, "__tensor_flatten__") else [part])]


def repack(like: Any, weight: Tensor) -> Tensor:
    """`weight` quantised by torchao itself, with the settings of `like`; `StateError` where those are not known."""
    make = _MAKERS.get(type(like).__qualname__)
    if make is None:
        raise StateError(
            f"torchao's {type(like).__qualname__} does not say how it was made: merge into='dense' and quantise again"
        )
    made: Tensor = make(like, weight.detach().to(like.dtype).contiguous())
    return made


def repack_nf4(like: Any, weight: Tensor) -> Tensor:
    """`weight` as NF4 with the blocks of `like`."""
    made: Tensor = type(like).from_tensor(weight.detach().to(like.dtype), like.block_size, like.scaler_block_size)
    return made


def _int8(like: Any, weight: Tensor) -> Tensor:
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    rows, columns = like.block_size[-2:]
    whole: Any = PerTensor() if rows == like.shape[-2] > 1 else PerRow()
    per = PerGroup(columns) if columns < like.shape[-1] else whole
    even = like.zero_point is None or not bool(like.zero_point.any())
    made: Tensor = type(like).from_hp(
        weight,
        per,
        MappingType.SYMMETRIC if even else MappingType.ASYMMETRIC,
        act_quant_kwargs=like.act_quant_kwargs,
        reduce_range=bool(like.reduce_range),
    )
    return made


def _intx(like: Any, weight: Tensor) -> Tensor:
    from torchao.quantization.quant_primitives import MappingType

    even = not bool(like.zero_point.any())
    made: Tensor = type(like).from_hp(
        weight,
        like.block_size,
        like.target_dtype,
        mapping_type=MappingType.SYMMETRIC if even else MappingType.ASYMMETRIC,
        activation_quantization=like.activation_quantization,
    )
    return made


_MAKERS: dict[str, Callable[[Any, Tensor], Tensor]] = {"Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx}
