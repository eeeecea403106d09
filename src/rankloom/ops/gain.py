"""A factor for every channel of many tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.ops.triton import usable


def scale_(y: Tensor, gain: Tensor) -> Tensor:
    """y (tokens, out) times gain (out,), in place."""
    if usable(y, y.dtype) and y.is_contiguous():
        from rankloom.ops.triton import gain as kernels

        return kernels.scale_(y, gain)
    return y.mul_(gain)


def scaled_and_summed(dy: Tensor, y: Tensor, gain: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """dy∘gain (tokens, out), and Σ_t dy∘y (out,) in `wide`."""
    if usable(dy, dy.dtype):
        from rankloom.ops.triton import gain as kernels

        return kernels.scaled_and_summed(dy, y, gain)
    return dy * gain, (dy * y).sum(0, dtype=wide)
