"""bitsandbytes' 4-bit weights (`Params4bit`, NF4 and FP4), decoded from their quantisation state.

Decoded here and not by bitsandbytes: its AVX-512 kernel misreads rows that are no multiple of the block. On CPUs with
AVX512-BF16 an eval forward rearranges codes and scales in place, rounds the scales to bfloat16, and from then on cuts
the gradient of the layer's input; both arrangements are read, and `settle` undoes the second one and forbids it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rankloom.errors import StateError

MAY_REARRANGE = "_rankloom_may_rearrange"
"""Where a settled layer keeps whether bitsandbytes was to rearrange its weight."""
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


def settle(layer: Any) -> None:
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
