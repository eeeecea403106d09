"""DoRA's gain g = m/‖W'‖: a factor for every channel of many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.ops.triton import usable

FAINT = 2.0**-64
"""The gain of a magnitude that is zero: the output is as good as zero, and still tells the magnitude's gradient."""


def remembers(dtype: torch.dtype) -> bool:
    """Whether an output times `FAINT` is more than zero in `dtype`."""
    return torch.finfo(dtype).tiny < FAINT


def gain_of(magnitude: Tensor, norms: Tensor, dtype: torch.dtype, gained: bool) -> tuple[Tensor, Tensor]:
    """m/‖W'‖ (out,) in `dtype`: 1 where the norm is zero, `FAINT` where only the magnitude is. And what turns Σ_t dy∘y
    into the magnitude's gradient, for y = W'x or, `gained`, that times the gain: (out,) in the dtype of the norms.
    """
    if usable(magnitude, dtype) and usable(norms, norms.dtype):
        from rankloom.ops.triton import gain as kernels

        return kernels.gain_of(magnitude, norms, dtype, FAINT, gained)
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
