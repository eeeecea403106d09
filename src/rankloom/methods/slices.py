"""Slices: separate changes for equal row blocks of one fused matrix (q, k, v in one layer), zero for the others.

W = [W_1; …; W_parts]; each block in `on` gets its own inner adapter, as LoRA's reference code does for fused attention
(arXiv 2106.09685, released code, `MergedLinear`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.errors import SettingsError, TargetError
from rankloom.methods.lora import LoRA
from rankloom.settings import Count


@dataclass(frozen=True)
class Slices(Method):
    """`inner` on each row block in `on`, out of `parts` equal ones: parts=3, on=(0, 2) is q and v of a fused qkv."""

    inner: Method = field(default_factory=LoRA)
    parts: Count = 3
    on: tuple[int, ...] = (0, 2)

    examples: ClassVar = {"on": ((0,), (1,))}

    def __post_init__(self) -> None:
        if not self.on or any(not 0 <= i < self.parts for i in self.on):
            raise SettingsError(f"on={self.on}: block numbers from 0 to {self.parts - 1}, at least one")

    def build(self, site: Site) -> Adapter:
        """One inner adapter for each block."""
        site.needs_matrix("slices")
        if site.kind.name.startswith("conv") and not site.kind.linear:
            raise TargetError(
                f"slices: site {site.name!r} is a {site.kind.name} layer; slices cut linear layers and parameters"
            )
        if site.out % self.parts:
            raise TargetError(f"slices: {site.name!r} has {site.out} rows, not a multiple of parts={self.parts}")
        return SlicesAdapter(site, self)


class SlicesAdapter(Adapter):
    """`blocks`: the inner adapter of each block in `on`, by number."""

    def __init__(self, site: Site, method: Slices) -> None:
        super().__init__(site.name)
        self.parts = method.parts
        rows = site.out // method.parts
        self.blocks = nn.ModuleDict()
        for number in method.on:
            shape = (*site.shape[:-2], rows, site.in_)
            inner = method.inner.build(site.part(f"{site.name}[{number}]", shape))
            if inner is not None:
                self.blocks[str(number)] = inner

    def reset(self, base: Base) -> None:
        for number, block in self._each():
            block.reset(self._cut(base, number))

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        axis = -2 if base.kind.name == "parameter" else -1
        pieces = list(torch.zeros_like(y).chunk(self.parts, dim=axis))
        for number, block in self._each():
            pieces[number] = block(x, y.chunk(self.parts, dim=axis)[number], self._cut(base, number))
        return torch.cat(pieces, dim=axis)

    def delta(self, base: Base) -> Tensor:
        changes = {number: block.delta(self._cut(base, number)) for number, block in self._each()}
        zero = torch.zeros_like(next(iter(changes.values())))
        return torch.cat([changes.get(number, zero) for number in range(self.parts)], dim=-2)

    def delta_bias(self, base: Base) -> Tensor | None:
        shifts = {n: s for n, block in self._each() if (s := block.delta_bias(self._cut(base, n))) is not None}
        if not shifts:
            return None
        zero = torch.zeros_like(next(iter(shifts.values())))
        return torch.cat([shifts.get(number, zero) for number in range(self.parts)])

    def _each(self) -> list[tuple[int, Adapter]]:
        return [(int(n), block) for n, block in self.blocks.items()]  # type: ignore[misc]

    def _cut(self, base: Base, number: int) -> Base:
        return Cut(base, self.parts, number)


class Cut(Base):
    """Row block `number` of a base, through the base's own kind."""

    __slots__ = ("number", "parts")

    def __init__(self, base: Base, parts: int, number: int) -> None:
        super().__init__(base.kind, base.layer, base.context, base.notes, base.rows)
        self.parts = parts
        self.number = number

    @property
    def name(self) -> str:
        return f"{super().name}[{self.number}]"

    def matrix(self) -> Tensor:
        return super().matrix().chunk(self.parts, dim=-2)[self.number]

    def bias(self) -> Tensor | None:
        bias = super().bias()
        return None if bias is None else bias.chunk(self.parts)[self.number]
