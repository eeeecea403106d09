"""A mask drawn from a seed by counting (Philox), the same whenever it is asked for: nothing of it is kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, QUARTER = 16, 128


def masked(x: Tensor, seed: Tensor, p: float, into: Tensor | None) -> Tensor:
    """x (tokens, in) times 0 with probability `p`, else 1/(1 − p), added to `into` in place where that is given."""
    x = x.contiguous()
    tokens, width = x.shape
    made = torch.empty_like(x) if into is None else into
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(width, 4 * QUARTER))
    drawn[grid](x, seed, made, tokens, width, p, 1 / (1 - p), ADD=into is not None, M=ROWS, N=QUARTER)
    return made


@triton.jit
def drawn(x, seed, made, tokens, width, p, scale, ADD: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """M tokens of four times N neighbours: every draw gives four numbers, one for each quarter."""
    token, column = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    first = token[:, None] + tl.zeros((M, N), dtype=tl.int32)
    second = column[None, :] + tl.zeros((M, N), dtype=tl.int32)
    a, b, c, d = tl.philox(tl.load(seed), first, second, second * 0, second * 0)
    start = tl.program_id(1) * 4 * N + tl.arange(0, N)
    quarter(x, made, a, token, start, tokens, width, p, scale, ADD)
    quarter(x, made, b, token, start + N, tokens, width, p, scale, ADD)
    quarter(x, made, c, token, start + 2 * N, tokens, width, p, scale, ADD)
    quarter(x, made, d, token, start + 3 * N, tokens, width, p, scale, ADD)


@triton.jit
def quarter(x, made, drawn_bits, token, column, tokens, width, p, scale, ADD: tl.constexpr):
    """The numbers at `column` of every token, kept or not."""
    here = (token < tokens)[:, None] & (column < width)[None, :]
    place = token[:, None].to(tl.int64) * width + column[None, :]
    kept = tl.uint_to_uniform_float(drawn_bits) >= p
    value = tl.where(kept, tl.load(x + place, here, 0.0).to(tl.float32) * scale, 0.0)
    if ADD:
        value += tl.load(made + place, here, 0.0).to(tl.float32)
    tl.store(made + place, value.to(made.dtype.element_ty), here)
