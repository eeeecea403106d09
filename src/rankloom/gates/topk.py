"""Top-k: of another gate's weights only the k largest act.

Renormalised to sum 1 (MoLA, arXiv 2402.08562), as they are (Switch, arXiv 2101.03961), or each 1 (LLaVA-MoLE,
arXiv 2401.16160, which multiplies nothing by its gate).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.core.base import Base
from rankloom.core.gate import Gate, Router
from rankloom.core.site import Site
from rankloom.errors import SettingsError
from rankloom.gates.linear import Linear


@dataclass(frozen=True)
class TopK(Gate):
    """`k` of the weights of `gate`; `weights` of those that act: "renormalised" to sum 1, "kept" as they are, "one"
    each. With "one" the router has no gradient from the task's loss: a balance rule alone moves it.
    """

    k: int = 2
    weights: Literal["renormalised", "kept", "one"] = "renormalised"
    gate: Gate = field(default_factory=Linear)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise SettingsError(f"k={self.k}: at least one expert acts")

    @property
    def constant(self) -> bool:
        """As the gate inside is."""
        return self.gate.constant

    def build(self, site: Site, n: int) -> Router:
        """The k largest of the gate inside; all of them where there are no more than k."""
        return TopKRouter(site, n, self)

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """The hooks of the gate inside."""
        return self.gate.patch(model)


class TopKRouter(Router):
    """`inner`: the router whose weights are cut."""

    def __init__(self, site: Site, n: int, gate: TopK) -> None:
        super().__init__(site, n)
        self.inner = gate.gate.build(site, n)
        self.k = self.top = min(gate.k, n)
        self.weights = gate.weights

    def reset(self) -> None:
        self.inner.reset()

    def forward(self, x: Any, base: Base) -> Tensor:
        found: Tensor = self.inner(x, base)
        values, chosen = found.topk(self.k, dim=-1)
        if x is not None:
            base.note("experts", chosen)
        if self.weights == "one":
            values = torch.ones_like(values)
        elif self.weights == "renormalised":
            values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(found).scatter(-1, chosen, values)
