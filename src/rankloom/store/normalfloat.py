"""NormalFloat: codes at the quantiles of a Gaussian, one scale for each block, the scales themselves kept in 8 bits.

QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314 §3. Packed values and their double quantisation are those of
bitsandbytes, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankloom.ops.triton import usable
from rankloom.ops.unpack import GROUPS, pack, unpack
from rankloom.settings import Count
from rankloom.store.base import Bits, Parts, Store

if TYPE_CHECKING:
    from rankloom.ops.triton.normalfloat import Code

OFFSET = 0.9677083
"""Outermost quantile: the mean of 1 − 1/32 and 1 − 1/30."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The published 4-bit table, in float32."""


@dataclass(frozen=True)
class NormalFloat(Store):
    """`bits` 2, 3, 4 or 8; a scale for each `block` weights (row-major); `double`: the scales are kept in 8 bits, by
    blocks of `double_block`.
    """

    bits: Bits = 4
    block: Count = 64
    double: bool = True
    double_block: Count = 256

    def encode(self, weight: Tensor) -> Parts:
        """codes (packed bytes) and absmax, or absmax8, absmax_scale, absmax_offset."""
        absmax = block_absmax(weight, self.block)
        parts = {"codes": nearest(weight, absmax, self.bits, self.block)}
        if not self.double:
            return parts | {"absmax": absmax}
        offset = absmax.mean()
        codes8, scale = _encode8(absmax - offset, self.double_block)
        return parts | {"absmax8": codes8, "absmax_scale": scale, "absmax_offset": offset}

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """table[code] · absmax, in float32, cast to `dtype`."""
        if self.bits == 4 and usable(parts["codes"], dtype):
            from rankloom.ops.triton import normalfloat as kernels

            return kernels.decoded(parts, shape, self._code(parts["codes"].device), dtype)
        return looked_up(parts["codes"], self.scales(parts), self.bits, self.block, shape).to(dtype)

    def product(self, x: Tensor, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
        """By a kernel for 4 bits and few rows on a GPU, where reading W is what takes the time."""
        if self.bits != 4 or not usable(x, x.dtype):
            return None
        from rankloom.ops.triton import normalfloat as kernels

        return kernels.product(x, parts, shape, self._code(x.device))

    def _code(self, device: torch.device) -> Code:
        from rankloom.ops.triton.normalfloat import Code

        values, outer = _tables(device)
        return Code(values, self.block, outer, self.double_block)

    def scales(self, parts: Mapping[str, Tensor]) -> Tensor:
        """absmax (blocks,) in float32."""
        if not self.double:
            return parts["absmax"]
        return _decode8(parts["absmax8"], parts["absmax_scale"], self.double_block) + parts["absmax_offset"]

    def grain(self) -> Mapping[str, tuple[int, int]]:
        codes = {"codes": GROUPS[self.bits]}
        if not self.double:
            return codes | {"absmax": (self.block, 1)}
        double = {"absmax8": (self.block, 1), "absmax_scale": (self.block * self.double_block, 1)}
        return codes | double | {"absmax_offset": (0, 0)}

    def bits_per_weight(self) -> float:
        """Codes and scales: 4.127 for NF4 with blocks of 64 and 256."""
        scale = 8 / self.block + 32 / (self.block * self.double_block) if self.double else 32 / self.block
        return self.bits + scale


@cache
def quantiles(bits: int) -> tuple[float, ...]:
    """The 2**bits code values, ascending from −1 to 1 with an exact 0; the published table for 4 bits."""
    if bits == 4:
        return NF4
    half = 2 ** (bits - 1)
    positive = [NormalDist().inv_cdf(OFFSET + (0.5 - OFFSET) * i / half) for i in range(half)]
    negative = [-NormalDist().inv_cdf(OFFSET + (0.5 - OFFSET) * i / (half - 1)) for i in range(half - 1)]
    top = max(positive)
    return tuple(sorted(v / top for v in [*positive, 0.0, *negative]))


def table(bits: int, device: torch.device) -> Tensor:
    """`quantiles` as a float32 tensor."""
    return torch.tensor(quantiles(bits), dtype=torch.float32, device=device)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 4-bit values and those of the 8-bit scales; only for kernels, so that no tracer's tensor is ever kept."""
    return table(4, device), torch.tensor(dynamic_code(), device=device)


def midpoints(bits: int, device: torch.device) -> Tensor:
    """Boundaries between neighbouring codes, float32."""
    code = table(bits, device)
    return (code[:-1] + code[1:]) / 2


def blocks_of(flat: Tensor, block: int) -> Tensor:
    """(blocks, block): a flat tensor cut in blocks, the last one padded by 0."""
    missing = -flat.numel() % block
    return (pad(flat, (0, missing)) if missing else flat).reshape(-1, block)


def block_absmax(weight: Tensor, block: int) -> Tensor:
    """The largest magnitude of each block, (blocks,) float32."""
    return blocks_of(weight.reshape(-1).float(), block).abs().amax(-1)


def nearest(weight: Tensor, absmax: Tensor, bits: int, block: int) -> Tensor:
    """Packed bytes of the codes nearest to weight/absmax."""
    scaled = blocks_of(weight.reshape(-1).float(), block) * (1.0 / absmax.clamp_min(1e-38))[:, None]
    flat = scaled.clamp(-1, 1).flatten()[: weight.numel()]
    return pack(torch.bucketize(flat, midpoints(bits, flat.device), out_int32=True), bits)


def looked_up(codes: Tensor, absmax: Tensor, bits: int, block: int, shape: torch.Size) -> Tensor:
    """table[code] · absmax of `shape`, float32: what `nearest` kept."""
    n = shape.numel()
    weight = blocks_of(_values(codes, bits)[:n], block) * absmax[:, None]
    return weight.flatten()[:n].reshape(shape)


def _values(data: Tensor, bits: int) -> Tensor:
    """table[code] of all codes in packed bytes, padding included; a whole byte is looked up at once where it can be."""
    values = table(bits, data.device)
    if 8 % bits:
        return values.index_select(0, unpack(data, bits, 8 * data.numel() // bits).int())
    every = unpack(torch.arange(256, dtype=torch.uint8, device=data.device), bits, 2048 // bits)
    return values.index_select(0, every.int()).reshape(256, -1).index_select(0, data.int()).flatten()


@cache
def dynamic_code() -> tuple[float, ...]:
    """The signed 8-bit dynamic-exponent table (Dettmers et al., arXiv 2110.02861): 256 values from about −1 to 1."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        values += means + [-v for v in means]
    return tuple(sorted(values))


def _encode8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    blocks = blocks_of(x, block)
    scale = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / scale.clamp_min(1e-38))[:, None]).clamp(-1, 1).flatten()[: x.numel()]
    code = torch.tensor(dynamic_code(), device=x.device)
    return torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8), scale


def _decode8(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    values = torch.tensor(dynamic_code(), device=codes.device).index_select(0, codes.int())
    return values * scale.repeat_interleave(block)[: codes.numel()]
