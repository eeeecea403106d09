"""‖W + s·B A‖ by rows in one pass over W; the reference is `ops.linalg.row_norms`.

A is rounded to the dtype of W, as in the layer's own product; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, TILE = 16, 2048
"""Rows of W, and numbers of A, that a program holds at a time."""
WIDEST = 64
"""The largest rank whose Gram matrix a program holds."""


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor) -> Tensor:
    """‖W + s·B A‖ (out,) in float32, for W (out, in), A (r, in), B (out, r) and ‖W‖² by rows, `square`."""
    weight, a, b = weight.contiguous(), a.contiguous(), b.contiguous()
    (out, in_), rank = weight.shape, a.shape[0]
    made = torch.empty(out, dtype=torch.float32, device=weight.device)
    precision = "ieee" if torch.version.hip else "tf32x3"
    wide = max(16, triton.next_power_of_2(rank))
    tiles = {"PRECISION": precision, "M": ROWS, "K": TILE // wide, "R": wide}
    normed[(triton.cdiv(out, ROWS),)](weight, a, b, square, made, out, in_, rank, scaling, **tiles)
    return made


@triton.jit
def normed(
    w, a, b, square, made, out, in_, rank, scaling,
    PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """M rows: ‖w‖² + 2s·⟨wAᵀ + s/2·b(AAᵀ), b⟩."""
    row, r = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, R)
    along, gram = tl.zeros((M, R), dtype=tl.float32), tl.zeros((R, R), dtype=tl.float32)
    for start in range(0, in_, K):
        k = start + tl.arange(0, K)
        within = (k < in_)[None, :]
        place = row[:, None].to(tl.int64) * in_ + k[None, :]
        rows = tl.load(w + place, (row < out)[:, None] & within, 0.0)
        thin = tl.load(a + r[:, None] * in_ + k[None, :], (r < rank)[:, None] & within, 0.0).to(rows.dtype)
        along += tl.dot(rows, tl.trans(thin), input_precision=PRECISION)
        gram += tl.dot(thin, tl.trans(thin), input_precision=PRECISION)
    here = (row < out)[:, None] & (r < rank)[None, :]
    up = tl.load(b + row[:, None] * rank + r[None, :], here, 0.0).to(tl.float32)
    along += 0.5 * scaling * tl.dot(up, gram, input_precision=PRECISION)
    total = tl.load(square + row, row < out, 0.0) + 2 * scaling * tl.sum(along * up, axis=1)
    tl.store(made + row, tl.sqrt(tl.where(total < 0, 0.0, total)), row < out)
