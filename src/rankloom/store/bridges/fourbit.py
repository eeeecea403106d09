"""bitsandbytes' 4-bit weights (`Params4bit`, NF4 and FP4), decoded from their quantisation state.

Decoded here and not by bitsandbytes: its AVX-512 kernel misreads rows that are no multiple of the block. On CPUs with
AVX512-BF16 an eval forward rearranges codes and scales in place, rounds the scales to bfloat16, and from then on cuts
the gradient of the layer's input; both arrangements are read, and `normalise` undoes the second one and forbids
it. Where its product is by misread rows, `ByCodes` multiplies in its place.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from rankloom.errors import StateError

MAY_REARRANGE = "_rankloom_may_rearrange"
"""Where a normalised layer keeps whether bitsandbytes was to rearrange its weight."""
LANES = 32
"""Rows that bitsandbytes' CPU arrangement keeps together."""


def read(weight: Tensor) -> Tensor:
    """The dense (out, in) weight in the dtype that it was packed from. Raises `StateError` for one not packed yet."""
    return _decoded(weight, _state(weight, None))


def weight_of(layer: nn.Module) -> Tensor:
    """`read` of a `Linear4bit`, also where the state stands at the layer alone (a sharded parameter)."""
    weight: Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    return _decoded(weight, _state(weight, layer))


def repack(like: Any, weight: Tensor) -> Tensor:
    """`weight` quantised by bitsandbytes itself, with the settings of `like`."""
    state = _state(like, None)
    made: Tensor = type(like)(
        weight.detach().to("cpu", _dtype(state)).contiguous(),
        requires_grad=False,
        blocksize=state.blocksize,
        compress_statistics=_nested(state),
        quant_type=state.quant_type,
        quant_storage=like.quant_storage,
    ).to(like.device)
    return made


def stored(weight: Tensor) -> list[Tensor]:
    """Codes and scales."""
    state = _state(weight, None)
    nested = [state.state2.absmax, state.offset] if state.nested else []
    return [weight.data, state.absmax, *nested]


def count(weight: Tensor) -> int:
    """Numbers in the weight, of which two share a byte."""
    return int(_state(weight, None).shape.numel())


def normalise(layer: Any) -> None:
    """Codes and scales row by row, now and after every forward, and one state for weight and layer."""
    layer.__dict__.setdefault(MAY_REARRANGE, layer.support_avx512bf16_for_cpu)
    layer.support_avx512bf16_for_cpu = False
    weight = layer._parameters["weight"]
    if weight.is_floating_point():
        layer.quant_state = getattr(weight, "quant_state", None)
        return
    state = _state(weight, layer)
    if type(weight) is nn.Parameter:
        weight = layer._parameters["weight"] = _named_again(weight, state)
    if _rearranged(state):
        weight.data = _rows(weight, state).view(state.original_qshape)
        if getattr(state, "original_storage_type", None) is not None:
            weight.data = weight.data.view(state.original_storage_type)
        state.absmax = state.absmax.T.reshape(-1).float()
        state.dtype, state.packing_format_for_cpu = state.original_dtype, False
    weight.quant_state = layer.quant_state = state


def release(layer: Any) -> None:
    """Let bitsandbytes rearrange the weight again, where it would have."""
    layer.support_avx512bf16_for_cpu = layer.__dict__.pop(MAY_REARRANGE, layer.support_avx512bf16_for_cpu)


class ByCodes(nn.Module):
    """Goes before `Linear4bit`: where bitsandbytes misreads such rows on this CPU, the product is with their codes."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not _misread(_state(self._parameters["weight"], self)):
            return super().forward(x)  # type: ignore[no-any-return]
        dtype: torch.dtype = getattr(self, "compute_dtype", None) or x.dtype
        y: Tensor = _Product.apply(x.to(dtype), self)  # type: ignore[no-untyped-call]
        bias = self._parameters["bias"]
        return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ with W decoded for the product only: backward decodes it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        return linear(x, weight_of(layer).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy @ weight_of(ctx.layer).to(dy.dtype), None


def _misread(state: Any) -> bool:
    columns: int = state.shape[-1]
    return columns % state.blocksize != 0 and _misreads(columns, state.blocksize, state.quant_type, _dtype(state))


@cache
def _misreads(columns: int, block: int, quant_type: str, dtype: torch.dtype) -> bool:
    """Whether bitsandbytes reads rows of so many columns otherwise than by their codes: tried on a few."""
    functional = sys.modules["bitsandbytes.functional"]
    made = torch.randn(8, columns, generator=torch.Generator().manual_seed(0), device="cpu")
    packed, state = functional.quantize_4bit(made.to(dtype), blocksize=block, quant_type=quant_type)
    true, found = _decoded(packed, state).float(), functional.dequantize_4bit(packed, state).float()
    off = float((found - true).norm() / true.norm())
    if off < 0.01:
        return False
    warnings.warn(
        f"bitsandbytes {sys.modules['bitsandbytes'].__version__} misreads {quant_type} rows of {columns} on this CPU "
        f"(off by {off:.0%}): layers with adapters multiply by the codes instead, those without are left as they are, "
        "so the model computes otherwise than before it was adapted",
        stacklevel=2,
    )
    return True


def _named_again(weight: nn.Parameter, state: Any) -> Any:
    """The Params4bit that `weight` was before pickling or sharding made a plain parameter of it."""
    return sys.modules["bitsandbytes.nn.modules"].Params4bit(
        weight.data,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=_nested(state),
        quant_type=state.quant_type,
        quant_storage=weight.dtype,
        bnb_quantized=True,
    )


def _state(weight: Any, layer: Any) -> Any:
    state = getattr(weight, "quant_state", None)
    state = getattr(layer, "quant_state", None) if state is None else state
    if state is None:
        raise StateError(
            f"a Params4bit of {tuple(weight.shape)} is not packed yet: bitsandbytes packs it when the model moves to "
            "its device; call model.to('cpu') or model.to('cuda') first"
        )
    return state


def _rearranged(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _dtype(state: Any) -> torch.dtype:
    dtype: torch.dtype = state.original_dtype if _rearranged(state) else state.dtype
    return dtype


def _nested(state: Any) -> bool:
    return bool(state.original_nested if _rearranged(state) else state.nested)


def _decoded(weight: Tensor, state: Any) -> Tensor:
    shape: torch.Size = state.shape
    data = _rows(weight, state) if _rearranged(state) else weight.data.contiguous().view(torch.uint8).flatten()
    code: Tensor = state.code.to(data.device)
    of_bytes = torch.stack((code.repeat_interleave(16), code.repeat(16)), -1)
    values = of_bytes.index_select(0, data.int()).flatten()
    blocks = pad(values, (0, -values.numel() % state.blocksize)).reshape(-1, state.blocksize)
    weight = blocks * _scales(state)[:, None]
    return weight.flatten()[: shape.numel()].reshape(shape).to(_dtype(state))


def _scales(state: Any) -> Tensor:
    """absmax of the blocks in row-major order, float32."""
    if _rearranged(state):
        absmax: Tensor = state.absmax.T.reshape(-1)
    elif state.nested:
        inner = state.state2
        absmax = inner.code.index_select(0, state.absmax.flatten().int())
        absmax = absmax * inner.absmax.repeat_interleave(inner.blocksize)[: absmax.numel()] + state.offset
    else:
        absmax = state.absmax.flatten()
    return absmax.float()


def _rows(weight: Tensor, state: Any) -> Tensor:
    """The bytes in row-major order, out of blocks of 32 rows whose codes lie column by column."""
    rows, columns = state.shape
    data = weight.data.reshape(-1, LANES)
    codes = torch.cat((data & 0xF, data >> 4), -1).reshape(rows // LANES, columns // 2, LANES, 2)
    codes = codes.transpose(1, 2).reshape(-1, 2)
    packed: Tensor = (codes[:, 0] << 4) | codes[:, 1]
    return packed
