"""Block floating point: small signed integers that share a power-of-two scale by block.

The MXINT-type numbers of LQER, Zhang et al., ICML 2024, arXiv 2402.02446.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankloom.ops.unpack import GROUPS, pack, unpack
from rankloom.settings import Count
from rankloom.store.base import Bits, Parts, Store


@dataclass(frozen=True)
class BlockFloat(Store):
    """`bits` for sign and mantissa (2, 3, 4 or 8); `block` weights along a row share an 8-bit exponent."""

    bits: Bits = 4
    block: Count = 16

    def encode(self, weight: Tensor) -> Parts:
        """codes (packed bytes) and exponent (blocks,) int8: the largest value of a block uses the top of the range."""
        flat = weight.reshape(-1).float()
        blocks = pad(flat, (0, -flat.numel() % self.block)).reshape(-1, self.block)
        top = 2 ** (self.bits - 1) - 1
        power = torch.frexp(blocks.abs().amax(-1).clamp_min(2.0**-126)).exponent - 1
        exponent = (power - (self.bits - 2)).clamp(-126, 127)
        codes = torch.ldexp(blocks, -exponent[:, None]).round().clamp(-top, top) + top
        return {
            "codes": pack(codes.flatten()[: flat.numel()].to(torch.uint8), self.bits),
            "exponent": exponent.to(torch.int8),
        }

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """mantissa · 2**exponent, cast to `dtype`."""
        n = shape.numel()
        mantissa = unpack(parts["codes"], self.bits, n).float() - (2 ** (self.bits - 1) - 1)
        scale = parts["exponent"].float().exp2().repeat_interleave(self.block)[:n]
        weight: Tensor = mantissa * scale
        return weight.reshape(shape).to(dtype)

    def grain(self) -> Mapping[str, tuple[int, int]]:
        return {"codes": GROUPS[self.bits], "exponent": (self.block, 1)}

    def bits_per_weight(self) -> float:
        """Mantissas and shared exponents."""
        return self.bits + 8 / self.block
