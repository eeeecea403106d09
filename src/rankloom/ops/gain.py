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


def gain_of(magnitude: Tensor, norms: Tensor, dtype: torch.dtype) -> Tensor:
    """m/‖W'‖ (out,) in `dtype`: 1 where the norm is zero, `FAINT` where only the magnitude is."""
    if usable(magnitude, dtype) and usable(norms, norms.dtype):
        from rankloom.ops.triton import gain as kernels

        return kernels.gain_of(magnitude, norms, dtype, FAINT)
    faint = torch.where(magnitude == 0, magnitude + FAINT * norms, magnitude)
    return torch.where(norms == 0, 1.0, faint / norms).to(dtype)


def scale_(y: Tensor, gain: Tensor) -> Tensor:
    """y (tokens, out) times gain (out,), in place."""
    if usable(y, y.dtype) and y.is_contiguous():
        from rankloom.ops.triton import gain as kernels

        return kernels.scale_(y, gain)
    return y.mul_(gain)


def backward(dy: Tensor, y: Tensor, gain: Tensor, norms: Tensor, gained: bool) -> tuple[Tensor, Tensor]:
    """dy∘g (tokens, out), and the magnitude's gradient Σ_t dy∘(W'x)/‖W'‖ (out,) in the dtype of the norms, 0 where the
    norm is; y is W'x, `gained`: times g.
    """
    if usable(dy, dy.dtype) and usable(norms, norms.dtype):
        from rankloom.ops.triton import gain as kernels

        return kernels.backward(dy, y, gain, norms, gained)
    wide = norms.dtype
    total = (dy * y).sum(0, dtype=wide) / (gain.to(wide) * norms if gained else norms)
    return dy * gain, total.masked_fill_(norms == 0, 0.0)
