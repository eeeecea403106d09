"""SGMV and BGMV: the thin products of a mixed batch, y_t ← y_t + s_i·x_t A_iᵀ B_iᵀ, in two kernels for all adapters.

A program takes a block of neighbouring tokens of one adapter: 16 or 64 at a time on tensor cores (segments: Punica,
Chen et al., MLSys 2024, arXiv 2310.18547); where rows have few tokens (decoding), the first product takes a single one
and two rows of A. Sums are float32. The reference is `ops.segments.added`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def added(y: Tensor, x: Tensor, found, held, most: int) -> Tensor:
    """`y` (rows, …, out) with the changes for `x` (rows, …, in) written into it, as `ops.segments.added`; rows of up to
    `most` tokens are taken one by one.
    """
    flat, inputs = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]).contiguous()
    tokens = inputs.shape[0] // found.batch
    few = tokens <= most
    tile = 16 if tokens < 64 else 64
    _, r, width = held.a.shape
    rank, out = max(16, triton.next_power_of_2(r)), flat.shape[1]
    thin = torch.empty(inputs.shape[0], rank, dtype=x.dtype, device=x.device)
    rows = found.blocks(tokens, 1 if few else tile, x.device)
    columns, step = (2, 2048) if few else (rank, 128)
    shrink[(rows.shape[0], rank // columns)](
        inputs, held.a, held.scales, thin, rows, width, r, M=1 if few else tile, R=rank, P=columns, K=step
    )
    rows = found.blocks(tokens, tile, x.device)
    expand[(rows.shape[0], triton.cdiv(out, 128))](thin, held.b, flat, rows, out, r, M=tile, R=rank, N=128)
    return flat.reshape(y.shape)


@triton.jit
def shrink(
    x, a, scales, h, blocks, width, r,
    M: tl.constexpr, R: tl.constexpr, P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """P columns of h (tokens, R) = s·x Aᵀ for one block of tokens; columns beyond the rank are zero."""
    adapter = tl.load(blocks + 3 * tl.program_id(0)).to(tl.int64)
    first = tl.load(blocks + 3 * tl.program_id(0) + 1)
    end = tl.load(blocks + 3 * tl.program_id(0) + 2)
    token, row, at = first + tl.arange(0, M), tl.program_id(1) * P + tl.arange(0, P), tl.arange(0, K)
    total = tl.zeros((M, P), dtype=tl.float32)
    for start in range(0, width, K):
        column = start + at
        inside = column[None, :] < width
        xs = tl.load(x + token[:, None].to(tl.int64) * width + column[None, :], (token[:, None] < end) & inside, 0.0)
        rows = tl.load(a + (adapter * r + row[:, None]) * width + column[None, :], (row[:, None] < r) & inside, 0.0)
        if M == 1:
            total += tl.sum(xs.to(tl.float32) * rows.to(tl.float32), axis=1)[None, :]
        else:
            total += tl.dot(xs, tl.trans(rows), input_precision="ieee")
    total *= tl.load(scales + adapter).to(tl.float32)
    place = h + token[:, None].to(tl.int64) * R + row[None, :]
    tl.store(place, total.to(h.dtype.element_ty), token[:, None] < end)


@triton.jit
def expand(h, b, y, blocks, out, r, M: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """y (tokens, out) += h Bᵀ for one block of tokens and N channels; `b` holds Bᵀ."""
    adapter = tl.load(blocks + 3 * tl.program_id(0)).to(tl.int64)
    first = tl.load(blocks + 3 * tl.program_id(0) + 1)
    end = tl.load(blocks + 3 * tl.program_id(0) + 2)
    token, row = first + tl.arange(0, M), tl.arange(0, R)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = column[None, :] < out
    columns = tl.load(b + (adapter * r + row[:, None]) * out + column[None, :], (row[:, None] < r) & inside, 0.0)
    hs = tl.load(h + token[:, None].to(tl.int64) * R + row[None, :], token[:, None] < end, 0.0)
    place = y + token[:, None].to(tl.int64) * out + column[None, :]
    here = (token[:, None] < end) & inside
    change = tl.dot(hs, columns, input_precision="ieee")
    tl.store(place, (tl.load(place, here, 0.0).to(tl.float32) + change).to(y.dtype.element_ty), here)
