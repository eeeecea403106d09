"""A factor for every channel: g = m/‖W'‖, y ← g∘y, and in its backward dy∘g with Σ_t dy∘y, each in one pass.

Sums are float32 and in a fixed order. The references are the plain operations of `ops.gain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, STEPS = 32, 128, 8


def gain_of(magnitude: Tensor, norms: Tensor, dtype: torch.dtype, faint: float, gained: bool) -> tuple[Tensor, Tensor]:
    """m/‖W'‖ (out,) in `dtype`, and 1/‖W'‖ (out,), by the gain if y is `gained`."""
    made, inverse, out = torch.empty_like(magnitude, dtype=dtype), torch.empty_like(norms), len(norms)
    sizes = {"FAINT": faint, "GAINED": gained, "N": COLUMNS}
    gains[(triton.cdiv(out, COLUMNS),)](magnitude, norms, made, inverse, out, **sizes)
    return made, inverse


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
def gains(magnitude, norms, made, inverse, out, FAINT: tl.constexpr, GAINED: tl.constexpr, N: tl.constexpr):
    """N of m/‖W'‖, and of what makes the sums the magnitude's gradient."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    here = column < out
    m, norm = tl.load(magnitude + column, here, 0.0).to(tl.float32), tl.load(norms + column, here, 1.0).to(tl.float32)
    m = tl.where(m == 0, FAINT * norm, m)
    gain = tl.where(norm == 0, 1.0, m / norm).to(made.dtype.element_ty)
    tl.store(made + column, gain, here)
    divisor = gain.to(tl.float32) * norm if GAINED else norm
    tl.store(inverse + column, tl.where(norm == 0, 0.0, 1.0 / divisor).to(inverse.dtype.element_ty), here)


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
