"""y = x Wᵀ with W in 4-bit codes: a tile of W is looked up in registers, and the dense matrix is never in memory.

The codes of two neighbouring weights share a byte, the first one in the high bits; every `block` weights (row-major)
share a scale, which is itself an 8-bit code where `double` (NF4, QLoRA: Dettmers et al., NeurIPS 2023, arXiv 2305.14314
§3). Sums are float32. The reference is `NormalFloat.decode` and a plain product.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def product(
    x: Tensor, parts: Mapping[str, Tensor], shape: tuple[int, int], table: Tensor, block: int, outer: tuple[Tensor, int]
) -> Tensor:
    """x (…, in) times the transposed weight of `shape` (out, in), in x's dtype.

    `parts` as NormalFloat keeps them: codes, and absmax or absmax8, absmax_scale and absmax_offset; `table` (16,) the
    code values; `outer`: the table (256,) of the 8-bit scales and their block.
    """
    rows, width = shape
    flat = x.reshape(-1, width).contiguous()
    y = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    double = "absmax8" in parts
    scales = parts["absmax8"] if double else parts["absmax"]
    extra = (parts["absmax_scale"], parts["absmax_offset"]) if double else (scales, scales)
    grid = (triton.cdiv(flat.shape[0], 16), triton.cdiv(rows, 32))
    unpacked_product[grid](
        flat, parts["codes"], scales, *extra, table, outer[0], y, flat.shape[0], rows, width,
        BLOCK=block, OUTER=outer[1], DOUBLE=double, M=16, N=32, K=64,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], rows)


@triton.jit  # type: ignore[untyped-decorator]
def unpacked_product(
    x: Any, codes: Any, scales: Any, outer_scale: Any, offset: Any, table: Any, outer_table: Any, y: Any,
    tokens: Any, rows: Any, width: Any,
    BLOCK: tl.constexpr, OUTER: tl.constexpr, DOUBLE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    """One (M, N) tile of y."""
    token, row = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    total = tl.zeros((M, N), dtype=tl.float32)
    for start in range(0, width, K):
        column = start + tl.arange(0, K)
        here = (row[:, None] < rows) & (column[None, :] < width)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        byte = tl.load(codes + place // 2, here, 0).to(tl.int32)
        code = tl.where(place % 2 == 0, byte >> 4, byte & 15)
        scale = tl.load(scales + place // BLOCK, here, 0)
        if DOUBLE:
            inner = tl.load(outer_table + scale.to(tl.int32))
            scale = inner * tl.load(outer_scale + place // BLOCK // OUTER, here, 0.0) + tl.load(offset)
        weight = tl.where(here, tl.load(table + code) * scale, 0.0)
        seen = (token[:, None] < tokens) & (column[None, :] < width)
        xs = tl.load(x + token[:, None].to(tl.int64) * width + column[None, :], seen, 0.0)
        total += tl.dot(xs, tl.trans(weight.to(xs.dtype)), input_precision="ieee")
    out = y + token[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(out, total.to(y.dtype.element_ty), (token[:, None] < tokens) & (row[None, :] < rows))
