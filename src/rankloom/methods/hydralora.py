"""HydraLoRA: one shared A, several heads B, and a router that mixes them token by token.

Δy = s·Σ_i softmax(R x)_i B_i A dropout(x); A (r, in), B (n_b, out, r), R (n_b, in). Tian et al., NeurIPS 2024,
arXiv 2404.19245. The mixture depends on the input, so there is nothing to merge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.errors import TargetError
from rankloom.settings import Count, Probability, Rank


@dataclass(frozen=True)
class HydraLoRA(Method):
    """`n_b` heads of rank `r`; in eval mode `infer="top1"` takes the strongest head alone, `"soft"` mixes as always.

    `n_b` from data: `n_b=rankloom.ops.cluster.count_clusters(x)` on embeddings x (n, d) of the training texts.
    """

    r: Rank = 4
    lora_alpha: float = 32.0
    lora_dropout: Probability = 0.0
    n_b: Count = 4
    infer: Literal["soft", "top1"] = "soft"

    def build(self, site: Site) -> Adapter:
        """HydraLoRA of one linear layer."""
        site.needs_input("hydralora")
        if not site.kind.linear:
            raise TargetError(
                f"hydralora: site {site.name!r} is a {site.kind.name} layer; it routes linear layers only"
            )
        return HydraLoRAAdapter(site, self)


class HydraLoRAAdapter(Adapter):
    """A (r, in), B (n_b, out, r), router (n_b, in)."""

    roles = {"A": "in", "B": "out", "router": "router"}

    def __init__(self, site: Site, method: HydraLoRA) -> None:
        super().__init__(site.name)
        self.scaling = method.lora_alpha / method.r
        self.dropout = method.lora_dropout
        self.infer = method.infer
        self.A = site.empty(method.r, site.in_)
        self.B = nn.Parameter(torch.empty(method.n_b, site.out, method.r, dtype=site.dtype, device=site.device))
        self.router = site.empty(method.n_b, site.in_)

    def reset(self, base: Base) -> None:
        bound = 1 / math.sqrt(self.A.shape[-1])
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.uniform_(self.router, -bound, bound)
        nn.init.zeros_(self.B)

    def thin(self, base: Base, x: Any) -> Thin:
        self.needs_input(x)
        heads = self.weights(x)
        n, r = heads.shape[-1], self.A.shape[0]
        return Thin(
            self.A.repeat(n, 1),
            self.B.transpose(0, 1).flatten(1),
            self.scaling,
            inner=heads.repeat_interleave(r, dim=-1),
            dropout=self.dropout if self.training else 0.0,
        )

    def weights(self, x: Tensor) -> Tensor:
        """Mixing weights (…, n_b) of the heads for input (…, in), in float32."""
        soft = F.linear(x.float(), self.router.float()).softmax(-1)
        if self.training or self.infer == "soft":
            return soft
        return F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
