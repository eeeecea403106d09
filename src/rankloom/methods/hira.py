"""HiRA: a low-rank matrix multiplies the weight element by element, so the change is of high rank.

ΔW = W ∘ (B A), A (r, in), B (out, r), no scale; B starts at zero (of embeddings: A). Huang et al., ICLR 2025
(openreview TwJrTz9cRS) eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.thin import dropped
from rankloom.methods.lycoris import spread
from rankloom.settings import Probability, Rank


@dataclass(frozen=True)
class HiRA(Method):
    """`r` of the product that multiplies W; `hira_dropout`: of the change's input; `init_weights`: how A starts."""

    r: Rank = 32
    hira_dropout: Probability = 0.0
    init_weights: Literal["kaiming", "gaussian"] = "kaiming"

    def build(self, site: Site) -> Adapter:
        """HiRA of one site."""
        site.needs_matrix("hira")
        return HiRAAdapter(site, self)


class HiRAAdapter(Adapter):
    """A (…, r, in), B (…, out, r)."""

    roles = {"A": "in", "B": "out"}

    def __init__(self, site: Site, method: HiRA) -> None:
        super().__init__(site.name)
        self.dropout, self.start = method.hira_dropout, method.init_weights
        self.A = site.empty(method.r, site.in_)
        self.B = site.empty(site.out, method.r)

    def reset(self, base: Base) -> None:
        zero, moving = (self.A, self.B) if base.kind.name == "embedding" else (self.B, self.A)
        nn.init.zeros_(zero)
        with torch.no_grad():
            if base.kind.name == "embedding":
                moving.normal_()
            elif self.start == "gaussian":
                moving.normal_(std=1 / self.A.shape[-2])
            else:
                spread(moving, moving.ndim - 2)

    def delta(self, base: Base) -> Tensor:
        return base.matrix().to(self.A.dtype) * (self.B @ self.A)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        return base.apply(dropped(x, y, self.dropout if self.training else 0.0), self.delta(base).to(y.dtype))
