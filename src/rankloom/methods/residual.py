"""Residual: a change that does not start at zero, minus its frozen start.

Δ = Δ_now − Δ_start. The base stays untouched, other adapters keep their base, and the start is exactly zero: what
PiSSA-type starts do by rewriting W, done without rewriting it. As there, the start knows no dropout.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from rankloom.core.adapter import Adapter, take_dropout, thin_of
from rankloom.core.base import Base
from rankloom.core.site import Site
from rankloom.core.thin import Thin, joined


class ResidualAdapter(Adapter):
    """`inner` is trained; `start` is a frozen copy of it, taken at reset."""

    more_than_thin = "the change drops out and its start does not, or one of them is more than a thin form"

    def __init__(self, site: Site, inner: Adapter) -> None:
        super().__init__(site.name)
        self.inner = inner
        self.start = copy.deepcopy(inner).requires_grad_(False)
        take_dropout(self.start)

    def reset(self, base: Base) -> None:
        self.inner.reset(base)
        self.start.load_state_dict(self.inner.state_dict())

    def thin(self, base: Base, x: Any) -> Thin | None:
        now, start = thin_of(self.inner, base, x), thin_of(self.start, base, x)
        if now is None or start is None or now.dropout:
            return None
        if all(extra is None for thin in (now, start) for extra in (thin.inner, thin.outer, thin.bias, thin.magnitude)):
            # B A − B₀A₀ = (B − B₀) A + B₀ (A − A₀): exactly zero at the start, and no large numbers that cancel
            a, b = torch.cat([now.A, now.A - start.A], dim=-2), torch.cat([now.B - start.B, start.B], dim=-1)
            return Thin(a, b, now.scale)
        return joined([(now, 1.0), (start, -1.0)])

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change: Tensor = self.inner(x, y, base) - self.start(x, y, base)
        return change

    def delta(self, base: Base) -> Tensor:
        return self.inner.delta(base) - self.start.delta(base)

    def delta_bias(self, base: Base) -> Tensor | None:
        now, start = self.inner.delta_bias(base), self.start.delta_bias(base)
        return None if now is None or start is None else now - start
