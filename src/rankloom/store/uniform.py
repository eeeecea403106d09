"""Group-wise affine integers: Ŵ = scale·(q − zero), one scale and one floating zero point for each (row, group).

The zero points stay floating, so a change that is constant inside a group can be added to them without loss
(QA-LoRA, arXiv 2309.14717 §3.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.errors import SettingsError
from rankloom.ops.affine import affine_codes, affine_grid
from rankloom.ops.unpack import GROUPS, pack, unpack
from rankloom.settings import Count
from rankloom.store.base import Bits, Packed, Parts, Store


@dataclass(frozen=True)
class Uniform(Store):
    """`bits` 2, 3, 4 or 8; `group` columns share a scale; the columns are a multiple of it."""

    bits: Bits = 4
    group: Count = 32

    def encode(self, weight: Tensor) -> Parts:
        """codes (packed bytes), scale and zero (…, rows, groups) in float32, or float64 for a float64 weight; round to
        nearest between each group's extremes.
        """
        groups = self._grouped(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        scale, zero = affine_grid(groups, self.bits)
        codes = affine_codes(groups, scale, zero, self.bits)
        return {"codes": pack(codes.flatten().to(torch.uint8), self.bits), "scale": scale, "zero": zero}

    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """scale·(q − zero), cast to `dtype`."""
        codes = unpack(parts["codes"], self.bits, shape.numel()).reshape(-1, self.group)
        scale, zero = parts["scale"].flatten(), parts["zero"].flatten()
        weight: Tensor = scale[:, None] * (codes.to(scale.dtype) - zero[:, None])
        return weight.reshape(shape).to(dtype)

    def grain(self) -> Mapping[str, tuple[int, int]]:
        return {"codes": GROUPS[self.bits], "scale": (self.group, 1), "zero": (self.group, 1)}

    def bits_per_weight(self) -> float:
        """Codes, scale and zero point."""
        return self.bits + 64 / self.group

    def _grouped(self, weight: Tensor) -> Tensor:
        if weight.shape[-1] % self.group:
            raise SettingsError(f"a weight with {weight.shape[-1]} columns cannot be cut into groups of {self.group}")
        return weight.reshape(*weight.shape[:-1], -1, self.group)


def fold_into_zeros(packed: Packed, change: Tensor) -> Packed:
    """The weight with `change` (…, rows, groups) added to every weight of each group, without loss.

    scale·(q − zero) + change = scale·(q − zero'), zero' = zero − change/scale: codes and scales are those of `packed`.
    Raises `SettingsError` for a weight of another store, or groups of another size.
    """
    if not isinstance(packed.store, Uniform):
        raise SettingsError(
            f"a weight kept as {packed.store} has no zero points to take a change; keep it as Uniform(bits=4, group=32)"
        )
    parts = packed.parts
    if parts["zero"].shape != change.shape:
        raise SettingsError(
            f"the change has shape {tuple(change.shape)}, the weight {tuple(parts['zero'].shape)} groups of "
            f"{packed.store.group}: give both the same group size"
        )
    zero = parts["zero"] - change.to(parts["zero"].dtype) / parts["scale"]
    return Packed({**parts, "zero": zero}, packed.store, packed.shape, packed.dtype)
