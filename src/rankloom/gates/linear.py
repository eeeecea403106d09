"""The gate of a layer: softmax of linear scores of the layer's own input, token by token.

weights = softmax((R x + b)/τ), R (n, in). MoLoRA, arXiv 2309.05444 §3; HydraLoRA, arXiv 2404.19245 eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from rankloom.core.base import Base
from rankloom.core.gate import Gate, Router
from rankloom.core.site import Site
from rankloom.gates.scores import Scores, check_temperature


@dataclass(frozen=True)
class Linear(Gate):
    """`bias` inside the softmax; `std` of R's normal start (None: uniform within 1/√in); `temperature` τ; `infer`: in
    evaluation the strongest expert alone, with weight 1 ("top1"), or all as in training.
    """

    bias: bool = False
    std: float | None = None
    temperature: float = 1.0
    infer: Literal["soft", "top1"] = "soft"

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def build(self, site: Site, n: int) -> Router:
        """Scores of the input of one linear layer."""
        site.needs_linear("linear gate", "it scores the tokens that a linear layer is given")
        return LinearRouter(site, n, self)


class LinearRouter(Router):
    """`scores`: of the layer's input."""

    def __init__(self, site: Site, n: int, gate: Linear) -> None:
        super().__init__(site, n)
        self.infer = gate.infer
        self.scores = Scores(site, n, site.in_, "inside" if gate.bias else "none", gate.std, gate.temperature)

    def reset(self) -> None:
        self.scores.reset()

    def forward(self, x: Any, base: Base) -> Tensor:
        found = self.scores(x) if x is not None else self.scores.blind()
        if found is None:
            raise self.no_matrix("depends on its input")
        weights: Tensor = found[0]
        if x is not None:
            base.note("router", found[1])
        if self.training or self.infer == "soft":
            return weights
        return F.one_hot(weights.argmax(-1), self.n).to(weights.dtype)
