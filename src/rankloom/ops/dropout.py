"""Dropout whose mask is kept as one bit an element, or on a GPU as the seed that it is drawn from again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rankloom.ops.triton import usable
from rankloom.ops.unpack import pack, unpack


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x (tokens, in) times a mask of 0 and 1/(1 − p), and what tells that mask again: packed bits (uint8) or a seed."""
    if usable(x, x.dtype):
        from rankloom.ops.triton import dropout as kernels

        seed = torch.randint(2**63 - 1, (1,), device=x.device)
        return kernels.masked(x, seed, p, None), seed
    dropped, mask = torch.native_dropout(x, p, True)
    return dropped, _bits(mask.flatten())


def masked(x: Tensor, told: Tensor, p: float, into: Tensor | None = None) -> Tensor:
    """x (tokens, in) times the mask of `told`; added to `into` in place where that is given."""
    if told.dtype == torch.int64:
        from rankloom.ops.triton import dropout as kernels

        return kernels.masked(x, told, p, into)
    mask = _unpacked(told, x.numel()).view(x.shape).to(x.dtype).mul_(1 / (1 - p))
    return x * mask if into is None else into.addcmul_(x, mask)


def _bits(mask: Tensor) -> Tensor:
    """A flat mask as `ops.unpack.pack` packs it; on a CPU by numpy, a hundred times faster."""
    if type(mask) is not Tensor or mask.device.type != "cpu":
        return pack(mask, 1)
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpacked(bits: Tensor, n: int) -> Tensor:
    """The first `n` of packed bits, uint8."""
    if type(bits) is not Tensor or bits.device.type != "cpu":
        return unpack(bits, 1, n)
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=n))
