"""Order as a pure function of (seed, epoch, index): the same on every machine, process and library version.

Each index gets a 64-bit key by SplitMix64 (Steele, Lea & Flood, OOPSLA 2014); the order is the sort by key.
Nothing is drawn from a generator, so any position can be reached without replaying the ones before.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
DRAWS = 0xD1B54A32D192ED03
"""Keeps the generators apart from the order of the same seed."""


def signed(value: int) -> int:
    """The low 64 bits of `value` read as a two's complement int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, elementwise on int64 (arithmetic modulo 2^64)."""
    z = (z ^ _shift(z, 30)) * signed(MULTIPLIERS[0])
    z = (z ^ _shift(z, 27)) * signed(MULTIPLIERS[1])
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def keys(n: int, seed: int, epoch: int = 0) -> Tensor:
    """The sort keys of indices 0…n−1 (int64, shape [n])."""
    stream = torch.tensor(signed(seed + GOLDEN))
    stream = mix(mix(stream) + signed((epoch + 1) * GOLDEN))
    return mix(stream + (torch.arange(n) + 1) * signed(GOLDEN))


def permutation(n: int, seed: int, epoch: int = 0) -> Tensor:
    """The indices 0…n−1 in the order of `(seed, epoch)` (int64, shape [n])."""
    return keys(n, seed, epoch).argsort(stable=True)


def generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A generator of this index's own in this epoch; what it draws depends on nothing else."""
    key = mix(torch.tensor(signed(seed ^ DRAWS)) + signed((epoch + 1) * GOLDEN))
    return torch.Generator().manual_seed(int(mix(key + signed((index + 1) * GOLDEN))))


def draw(n: int, k: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`k` of the indices 0…n−1 without repetition, ascending."""
    found: np.ndarray[Any, np.dtype[np.int64]] = permutation(n, seed)[:k].sort().values.numpy()
    return found
