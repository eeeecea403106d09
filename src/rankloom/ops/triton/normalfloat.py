"""4-bit codes read by kernels: `decoded` looks a weight up in one pass, `product` is y = x Wᵀ without W in memory.

The codes of two neighbouring weights share a byte, the first one in the high bits; every `block` weights (row-major)
share a scale, which is itself an 8-bit code where it is doubly quantised (NF4, QLoRA: Dettmers et al., NeurIPS 2023,
arXiv 2305.14314 §3). Sums are float32. The references are `NormalFloat.decode` and a plain product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW = 2
"""Rows of x up to which each is a matrix-vector product of its own; beyond it, `decoded` and a dense product take less
time.
"""
BLOCKS = (16, 32, 64, 128, 256)
"""Weights with one scale that `product` can read."""


class Code(NamedTuple):
    """What the numbers in a store stand for: `table` (16,) the 4-bit values; `block` weights share a scale, which is
    looked up in `outer` (256,), in blocks of `outer_block`, where it is an 8-bit code.
    """

    table: Tensor
    block: int
    outer: Tensor
    outer_block: int


def decoded(parts: Mapping[str, Tensor], shape: torch.Size, code: Code, dtype: torch.dtype) -> Tensor:
    """table[code] · scale of `shape` in `dtype`, bit for bit what the reference gives."""
    made = torch.empty(shape, dtype=dtype, device=parts["codes"].device)
    count, size = made.numel(), 2048
    grid = (triton.cdiv(count, size),)
    look_up[grid](parts["codes"], *_scales(parts, code), made, count, **_sizes(parts, code), K=size,
                  enable_fp_fusion=False)  # fmt: skip
    return made


def product(x: Tensor, parts: Mapping[str, Tensor], shape: torch.Size, code: Code) -> Tensor | None:
    """x (…, in) times the transposed weight of `shape` (out, in), in x's dtype; None for more than `FEW` rows of x, or
    where a row of the weight is not made of whole blocks.
    """
    rows, width = shape
    tokens = x.numel() // width
    if tokens > FEW or width % code.block or code.block not in BLOCKS:
        return None
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    row_product[(tokens, triton.cdiv(rows, 16))](
        x.contiguous(), parts["codes"], *_scales(parts, code), y, rows, width,
        **_sizes(parts, code), N=16, S=1024 // code.block,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], rows)


def _scales(parts: Mapping[str, Tensor], code: Code) -> tuple[Tensor, ...]:
    """The scales, what they are looked up by, and the table of the values."""
    if "absmax8" in parts:
        return parts["absmax8"], parts["absmax_scale"], parts["absmax_offset"], code.outer, code.table
    return (*[parts["absmax"]] * 3, code.outer, code.table)


def _sizes(parts: Mapping[str, Tensor], code: Code) -> dict[str, Any]:
    return {"BLOCK": code.block, "OUTER": code.outer_block, "DOUBLE": "absmax8" in parts}


@triton.jit
def scale_of(
    scales, outer_scale, offset, outer_table, number, here,
    OUTER: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """The float32 scales of the blocks `number`."""
    if not DOUBLE:
        return tl.load(scales + number, here, 0.0)
    inner = tl.load(outer_table + tl.load(scales + number, here, 0).to(tl.int32))
    return inner * tl.load(outer_scale + number // OUTER, here, 0.0) + tl.load(offset)


@triton.jit
def look_up(
    codes, scales, outer_scale, offset, outer_table, table, y, count,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, DOUBLE: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """K neighbouring weights."""
    place = tl.program_id(0).to(tl.int64) * K + tl.arange(0, K)
    byte = tl.load(codes + place // 2, place < count, 0).to(tl.int32)
    code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
    scale = scale_of(scales, outer_scale, offset, outer_table, place // BLOCK, place < count, OUTER, DOUBLE)
    tl.store(y + place, (tl.load(table + code) * scale).to(y.dtype.element_ty), place < count)


@triton.jit
def row_product(
    x, codes, scales, outer_scale, offset, outer_table, table, y,
    rows, width,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, DOUBLE: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """N outputs of one row of x; S whole blocks of every weight row at a time, their scales applied to their sums."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((N,), dtype=tl.float32)
    pair = tl.arange(0, BLOCK // 2)
    for start in range(0, width // BLOCK, S):
        block = start + tl.arange(0, S)
        inside = block < width // BLOCK
        here = (row < rows)[:, None] & inside[None, :]
        number = row[:, None].to(tl.int64) * (width // BLOCK) + block[None, :]
        byte = tl.load(codes + (number * (BLOCK // 2))[:, :, None] + pair[None, None, :], here[:, :, None], 0).to(
            tl.int32
        )
        at = x + token * width + (block * BLOCK)[:, None] + 2 * pair[None, :]
        first, second = tl.load(at, inside[:, None], 0.0), tl.load(at + 1, inside[:, None], 0.0)
        values = tl.load(table + (byte >> 4)) * first[None, :, :] + tl.load(table + (byte & 15)) * second[None, :, :]
        scale = scale_of(scales, outer_scale, offset, outer_table, number, here, OUTER, DOUBLE)
        total += tl.sum(tl.sum(values, axis=2) * tl.where(here, scale, 0.0), axis=1)
    tl.store(y + token * rows + row, total.to(y.dtype.element_ty), row < rows)
