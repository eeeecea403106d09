"""Random matrices as a function of a key and a counter: nothing is stored, no generator is touched.

Each number is a 32-bit hash of (key, index of the matrix, place in it), so any part can be made alone, and is the same
on every device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def uniform(key: int, first: int, count: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Matrices `first` … `first + count − 1` of the key: (count, *shape), uniform in [−1, 1), float32."""
    place = torch.arange(math.prod(shape), dtype=torch.int32, device=device)
    index = torch.arange(first, first + count, dtype=torch.int32, device=device)
    keys = _mix(_mix(index) ^ _signed(key))
    bits = _mix(_mix(place) + keys[:, None])
    return bits.to(torch.float32).mul_(2.0**-31).reshape(count, *shape)


def combined(coefficients: Tensor, key: int, shape: tuple[int, int], chunk: int) -> Tensor:
    """Σ_k c_k M_k for coefficients (…, K) and the matrices M_k of the key: (…, *shape) in the coefficients' dtype.

    The matrices are made in blocks of `chunk`, in backward again. A matrix has fewer than 2³¹ places.
    """
    found: Tensor = _Combined.apply(coefficients, key, shape, chunk)  # type: ignore[no-untyped-call]
    return found


def products(matrix: Tensor, key: int, count: int, chunk: int) -> Tensor:
    """⟨matrix, M_k⟩ of a matrix (…, out, in) with the first `count` matrices of the key: (…, count)."""
    shape, flat = (matrix.shape[-2], matrix.shape[-1]), matrix.flatten(-2)
    blocks = [
        flat @ uniform(key, first, min(chunk, count - first), shape, matrix.device).flatten(1).to(flat.dtype).mT
        for first in range(0, count, chunk)
    ]
    return torch.cat(blocks, dim=-1)


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, key: int, shape: tuple[int, int], chunk: int) -> Tensor:
        ctx.key, ctx.count, ctx.chunk = key, coefficients.shape[-1], chunk
        total = coefficients.new_zeros(*coefficients.shape[:-1], math.prod(shape))
        for first in range(0, ctx.count, chunk):
            part = coefficients[..., first : first + chunk]
            total += part @ uniform(key, first, part.shape[-1], shape, part.device).flatten(1).to(part.dtype)
        return total.reshape(*coefficients.shape[:-1], *shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return products(grads[0], ctx.key, ctx.count, ctx.chunk), None, None, None


def _mix(x: Tensor) -> Tensor:
    """A 32-bit hash, one to one, in place (int32 wraps around; the masks make its shifts logical)."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _signed(x: int) -> int:
    """A 32-bit number as int32 has it."""
    return x - (1 << 32) if x >= 1 << 31 else x
