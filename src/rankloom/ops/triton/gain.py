"""A factor for every channel: g = m/‖W'‖, y ← g∘y, and in its backward dy∘g with the gradient of m, each in one pass.

Sums are float32 and in a fixed order. The references are the plain operations of `ops.gain`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, STEPS = 32, 128, 8


def gain_of(magnitude: Tensor, norms: Tensor, dtype: torch.dtype, faint: float) -> Tensor:
    """m/‖W'‖ (out,) in `dtype`."""
    made = torch.empty_like(magnitude, dtype=dtype)
    gains[(triton.cdiv(len(made), COLUMNS),)](magnitude, norms, made, len(made), FAINT=faint, N=COLUMNS)
    return made


def scale_(y: Tensor, gain: Tensor) -> Tensor:
    """y (tokens, out) times gain (out,), in place; y is contiguous."""
    tokens, out = y.shape
    scaled[(triton.cdiv(tokens, ROWS), triton.cdiv(out, COLUMNS))](y, gain, tokens, out, M=ROWS, N=COLUMNS)
    return y


def backward(dy: Tensor, y: Tensor, gain: Tensor, norms: Tensor, gained: bool) -> tuple[Tensor, Tensor]:
    """dy∘gain (tokens, out) in dy's dtype, and Σ_t dy∘y (out,) by ‖W'‖, and by the gain where y is `gained`."""
    dy, y = dy.contiguous(), y.contiguous()
    tokens, out = dy.shape
    blocks, columns = triton.cdiv(tokens, ROWS * STEPS), triton.cdiv(out, COLUMNS)
    made, sums = torch.empty_like(dy), torch.empty(blocks, out, dtype=torch.float32, device=dy.device)
    summed[(blocks, columns)](dy, y, gain, made, sums, tokens, out, M=ROWS, N=COLUMNS, STEPS=STEPS)
    found = torch.empty_like(norms)
    divided[(columns,)](sums, gain, norms, found, blocks, out, GAINED=gained, N=COLUMNS)
    return made, found


@triton.jit
def gains(magnitude, norms, made, out, FAINT: tl.constexpr, N: tl.constexpr):
    """N of m/‖W'‖."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    here = column < out
    m, norm = tl.load(magnitude + column, here, 0.0).to(tl.float32), tl.load(norms + column, here, 1.0).to(tl.float32)
    m = tl.where(m == 0, FAINT * norm, m)
    tl.store(made + column, tl.where(norm == 0, 1.0, m / norm).to(made.dtype.element_ty), here)


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


@triton.jit
def divided(sums, gain, norms, found, blocks, out, GAINED: tl.constexpr, N: tl.constexpr):
    """The sums of N channels over all blocks, by ‖W'‖ and, if y had it in it, by the gain."""
    column = tl.program_id(0) * N + tl.arange(0, N)
    here = column < out
    total = tl.zeros((N,), dtype=tl.float32)
    for block in range(blocks):
        total += tl.load(sums + block * out + column, here, 0.0)
    norm = tl.load(norms + column, here, 1.0).to(tl.float32)
    if GAINED:
        total = total / tl.load(gain + column, here, 1.0).to(tl.float32)
    tl.store(found + column, tl.where(norm == 0, 0.0, total / norm).to(found.dtype.element_ty), here)
