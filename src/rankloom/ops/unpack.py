"""Small unsigned integers in bytes: 1, 2, 3, 4 or 8 bits each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUPS = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}
"""bits → (values, bytes) of the smallest whole group."""


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that `n` codes of `bits` bits take."""
    values, size = GROUPS[bits]
    return -(-n // values) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Flat uint8 codes below 2**bits → uint8 bytes; the first code takes the highest bits, 0 pads the last group."""
    values, size = GROUPS[bits]
    if bits == 8:
        return codes.to(torch.uint8)
    codes = pad(codes.to(torch.int32), (0, -codes.numel() % values)).reshape(-1, values)
    shifts = torch.arange(values - 1, -1, -1, device=codes.device, dtype=torch.int32) * bits
    words = (codes << shifts).sum(-1, dtype=torch.int32)
    parts = [(words >> (8 * (size - 1 - i))) & 0xFF for i in range(size)]
    return torch.stack(parts, -1).flatten().to(torch.uint8)


def unpack(data: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes of `pack`ed bytes, as flat uint8."""
    values, size = GROUPS[bits]
    if bits == 8:
        return data[:n]
    if bits == 4:
        return torch.stack((data >> 4, data & 0xF), -1).flatten()[:n]
    groups = data.reshape(-1, size).to(torch.int32)
    words = groups[:, 0]
    for i in range(1, size):
        words = (words << 8) | groups[:, i]
    shifts = torch.arange(values - 1, -1, -1, device=data.device, dtype=torch.int32) * bits
    codes: Tensor = (words[:, None] >> shifts) & (2**bits - 1)
    return codes.flatten()[:n].to(torch.uint8)
