"""Fixed weights, the same for every site and input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankloom.core.base import Base
from rankloom.core.gate import Gate, Router
from rankloom.core.site import Site
from rankloom.errors import SettingsError


@dataclass(frozen=True)
class Constant(Gate):
    """`weights` of the experts; none given: 1/n each."""

    weights: tuple[float, ...] = ()

    @property
    def constant(self) -> bool:
        """Always."""
        return True

    def build(self, site: Site, n: int) -> Router:
        """The weights of one site."""
        if self.weights and len(self.weights) != n:
            raise SettingsError(f"weights={self.weights}: {site.name!r} has {n} experts")
        return ConstantRouter(site, self.weights or (1 / n,) * n)


class ConstantRouter(Router):
    """`weights` as numbers: nothing is trained or saved."""

    def __init__(self, site: Site, weights: tuple[float, ...]) -> None:
        super().__init__(site, len(weights))
        self.weights = weights

    def forward(self, x: Any, base: Base) -> Tensor:
        device = x.device if isinstance(x, Tensor) else base.kind.tensor(base.layer).device
        return torch.tensor(self.weights, dtype=torch.float32, device=device)
