"""NormalFloat with scales in few bits: the quantiser whose settings LQ-LoRA chooses for each matrix.

The scale of a block is a small unsigned integer above the smallest scale of the matrix, so `scale_bits` may be 2, 3, 4
or 8. Guo et al., ICLR 2024, arXiv 2311.12023; released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankloom.ops.unpack import GROUPS, pack, unpack
from rankloom.settings import Count
from rankloom.store.base import Bits, Parts, Store
from rankloom.store.normalfloat import block_absmax, blocks_of, looked_up, nearest

WIDTH = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True)
class NestedFloat(Store):
    """`bits` a weight, `scale_bits` for each `block` weights, one `scale_dtype` number for each `double_block` blocks.

    Codes are chosen for the scales as they are kept, so an inexact scale costs as little as it can.
    """

    bits: Bits = 4
    scale_bits: Bits = 8
    scale_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    block: Count = 64
    double_block: Count = 256

    def encode(self, weight: Tensor) -> Parts:
        """codes and scale_codes (packed bytes), scale_top (blocks of blocks,), scale_offset ()."""
        absmax = block_absmax(weight, self.block)
        offset, levels = absmax.min(), 2**self.scale_bits - 1
        above = blocks_of(absmax - offset, self.double_block)
        top = above.amax(-1).to(getattr(torch, self.scale_dtype))
        steps = (above * (levels / top.float().clamp_min(1e-38))[:, None]).round().clamp(0, levels)
        kept = {
            "scale_codes": pack(steps.flatten()[: absmax.numel()], self.scale_bits),
            "scale_top": top,
            "scale_offset": offset,
        }
        return {"codes": nearest(weight, self.scales(kept, absmax.numel()), self.bits, self.block)} | kept

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """table[code] · scale, in float32, cast to `dtype`."""
        scales = self.scales(parts, -(-shape.numel() // self.block))
        return looked_up(parts["codes"], scales, self.bits, self.block, shape).to(dtype)

    def scales(self, parts: Mapping[str, Tensor], n: int) -> Tensor:
        """The scales of `n` blocks, float32."""
        steps = unpack(parts["scale_codes"], self.scale_bits, n).float()
        step = parts["scale_top"].float() / (2**self.scale_bits - 1)
        scales: Tensor = parts["scale_offset"] + steps * step.repeat_interleave(self.double_block)[:n]
        return scales

    def grain(self) -> Mapping[str, tuple[int, int]]:
        values, size = GROUPS[self.scale_bits]
        return {
            "codes": GROUPS[self.bits],
            "scale_codes": (values * self.block, size),
            "scale_top": (self.block * self.double_block, 1),
            "scale_offset": (0, 0),
        }

    def bits_per_weight(self) -> float:
        """b + b0/B0 + b1/(B0·B1): 4.127 for the defaults."""
        return self.bits + self.scale_bits / self.block + WIDTH[self.scale_dtype] / (self.block * self.double_block)
