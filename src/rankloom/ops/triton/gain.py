"""A factor for every channel: g = m/‖W'‖, y ← g∘y, and in its backward dy∘g with Σ_t dy∘y, each in one pass.

Sums are float32 and in a fixed order. The references are the plain operations of `ops.gain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, STEPS = 32, 128, 8
NORMED, TILE, WIDEST = 16, 2048, 64
"""Rows of W, and numbers of A, that a program holds at a time; the largest rank whose Gram matrix it holds."""


def gain_of(
    matrix: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    square: Tensor,
    magnitude: Tensor,
    dtype: torch.dtype,
    faint: float,
    gained: bool,
) -> tuple[Tensor, Tensor]:
    """m/‖W'‖ (out,) in `dtype`, and 1/‖W'‖ (out,) in float32, by the gain too if y is `gained`; one pass over W.

    A is rounded to the dtype of W, as in the layer's own product.
    """
    matrix, a, b = matrix.contiguous(), a.contiguous(), b.contiguous()
    (out, in_), rank = matrix.shape, a.shape[0]
    gain = torch.empty(out, dtype=dtype, device=matrix.device)
    inverse = torch.empty(out, dtype=torch.float32, device=matrix.device)
    wide = max(16, triton.next_power_of_2(rank))
    sizes = {"M": NORMED, "K": TILE // wide, "R": wide, "PRECISION": "ieee" if torch.version.hip else "tf32x3"}
    normed[(triton.cdiv(out, NORMED),)](
        matrix, a, b, square, magnitude, gain, inverse, out, in_, rank, scale, FAINT=faint, GAINED=gained, **sizes
    )
    return gain, inverse


def scale_(y: Tensor, gain: Tensor) -> Tensor:
    """y (tokens, out) times gain (out,), in place; y is contiguous."""
    tokens, out = y.shape
    scaled[(triton.cdiv(tokens, ROWS), triton.cdiv(out, COLUMNS))](y, gain, tokens, out, M=ROWS, N=COLUMNS)
    return y


def scaled_and_summed(dy: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """dy∘gain (tokens, out) in dy's dtype, and Σ_t dy∘y (out,) in float32."""
    dy, y = dy.contiguous(), y.contiguous()
    tokens, out = dy.shape
    blocks = triton.cdiv(tokens, ROWS * STEPS)
    made, sums = torch.empty_like(dy), torch.empty(blocks, out, dtype=torch.float32, device=dy.device)
    grid = (blocks, triton.cdiv(out, COLUMNS))
    summed[grid](dy, y, gain, made, sums, tokens, out, M=ROWS, N=COLUMNS, STEPS=STEPS)
    return made, sums.sum(0)


@triton.jit
def normed(
    w, a, b, square, magnitude, made, inverse, out, in_, rank, scaling,
    FAINT: tl.constexpr, GAINED: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M rows: ‖w‖² + 2s·⟨wAᵀ + s/2·b(AAᵀ), b⟩, the gain, and what makes the sums the magnitude's gradient."""
    row, r = tl.program_id(0) * M + tl.arange(0, M), tl.arange(0, R)
    along, gram = tl.zeros((M, R), dtype=tl.float32), tl.zeros((R, R), dtype=tl.float32)
    there = row < out
    for start in range(0, in_, K):
        k = start + tl.arange(0, K)
        within = (k < in_)[None, :]
        rows = tl.load(w + row[:, None].to(tl.int64) * in_ + k[None, :], there[:, None] & within, 0.0)
        thin = tl.load(a + r[:, None] * in_ + k[None, :], (r < rank)[:, None] & within, 0.0).to(rows.dtype)
        along += tl.dot(rows, tl.trans(thin), input_precision=PRECISION)
        gram += tl.dot(thin, tl.trans(thin), input_precision=PRECISION)
    up = tl.load(b + row[:, None] * rank + r[None, :], there[:, None] & (r < rank)[None, :], 0.0).to(tl.float32)
    along += 0.5 * scaling * tl.dot(up, gram, input_precision=PRECISION)
    total = tl.load(square + row, there, 1.0) + 2 * scaling * tl.sum(along * up, axis=1)
    norm = tl.sqrt(tl.where(total < 0, 0.0, total))
    m = tl.load(magnitude + row, there, 0.0).to(tl.float32)
    gain = tl.where(norm == 0, 1.0, tl.where(m == 0, FAINT, m / norm)).to(made.dtype.element_ty)
    tl.store(made + row, gain, there)
    divisor = gain.to(tl.float32) * norm if GAINED else norm
    tl.store(inverse + row, tl.where(norm == 0, 0.0, 1.0 / divisor), there)


@triton.jit
def scaled(y, gain, tokens, out, M: tl.constexpr, N: tl.constexpr):
    """One (M, N) tile of y."""
    token, column = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    here = (token < tokens)[:, None] & (column < out)[None, :]
    place = y + token[:, None].to(tl.int64) * out + column[None, :]
    g = tl.load(gain + column, column < out, 0.0).to(tl.float32)
    tl.store(place, (tl.load(place, here, 0.0).to(tl.float32) * g[None, :]).to(y.dtype.element_ty), here)


@triton.jit
def summed(dy, y, gain, made, sums, tokens, out, M: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr):
    """STEPS·M tokens of N channels."""
    column = tl.program_id(1) * N + tl.arange(0, N)
    g = tl.load(gain + column, column < out, 0.0).to(tl.float32)
    total = tl.zeros((N,), dtype=tl.float32)
    for step in range(STEPS):
        token = (tl.program_id(0) * STEPS + step) * M + tl.arange(0, M)
        here = (token < tokens)[:, None] & (column < out)[None, :]
        place = token[:, None].to(tl.int64) * out + column[None, :]
        given = tl.load(dy + place, here, 0.0).to(tl.float32)
        total += tl.sum(given * tl.load(y + place, here, 0.0).to(tl.float32), axis=0)
        tl.store(made + place, (given * g[None, :]).to(made.dtype.element_ty), here)
    tl.store(sums + tl.program_id(0).to(tl.int64) * out + column, total, column < out)
