"""DoRA's gain g = m/‖W'‖: a factor for every channel of many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.ops.linalg import row_norms
from rankloom.ops.triton import usable

FAINT = 2.0**-64
"""The gain of a magnitude that is zero: the output is as good as zero, and still tells the magnitude's gradient."""


def remembers(dtype: torch.dtype) -> bool:
    """Whether an output times `FAINT` is more than zero in `dtype`."""
    return torch.finfo(dtype).tiny < FAINT


def gain_of(
    matrix: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    square: Tensor,
    magnitude: Tensor,
    dtype: torch.dtype,
    gained: bool,
) -> tuple[Tensor, Tensor]:
    """m/‖W'‖ (out,) in `dtype` for W' = W + s·B A, W (out, in), A (r, in), B (out, r), with ‖W‖² by rows in `square`:
    1 where the norm is zero, `FAINT` where only the magnitude is. And `inverse` (out,), which turns Σ_t dy∘y into the
    magnitude's gradient, for y = W'x or, `gained`, that times the gain.
    """
    if usable(matrix, dtype) and usable(magnitude, magnitude.dtype):
        from rankloom.ops.triton import gain as kernels

        if len(a) <= kernels.WIDEST:
            return kernels.gain_of(matrix, a, b, scale, square, magnitude, dtype, FAINT, gained)
    return by_norms(magnitude, row_norms(matrix, a, b, scale, square), dtype, gained)


def by_norms(magnitude: Tensor, norms: Tensor, dtype: torch.dtype, gained: bool) -> tuple[Tensor, Tensor]:
    """The gain and its `inverse` where the norms are known; differentiable by the magnitude."""
    gone = norms == 0
    faint = torch.where(magnitude == 0, magnitude + FAINT * norms, magnitude)
    gain = torch.where(gone, 1.0, faint / norms).to(dtype)
    return gain, torch.where(gone, 0.0, 1 / (gain.to(norms.dtype) * norms if gained else norms))


def scale_(y: Tensor, gain: Tensor) -> Tensor:
    """y (tokens, out), contiguous, times gain (out,), in place."""
    if usable(y, y.dtype):
        from rankloom.ops.triton import gain as kernels

        return kernels.scale_(y, gain)
    return y.mul_(gain)


def scaled_and_summed(dy: Tensor, y: Tensor, gain: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """dy∘gain (tokens, out), and Σ_t dy∘y (out,) in `wide`."""
    if usable(dy, dy.dtype):
        from rankloom.ops.triton import gain as kernels

        return kernels.scaled_and_summed(dy, y, gain)
    return dy * gain, (dy * y).sum(0, dtype=wide)
