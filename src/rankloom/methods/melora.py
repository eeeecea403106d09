"""MELoRA: an ensemble of small LoRAs, each on a slice of the input and a slice of the output.

ΔW = blockdiag(s_k B_k A_k), A_k (r_k, in/n), B_k (out/n, r_k), s_k = alpha_k/r_k: rank up to Σ r_k with as many numbers
as one LoRA of the mean rank. Ren et al., ACL 2024, arXiv 2402.17263 §3. The ensemble is one thin form of rank Σ r_k,
its factors block-diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError, TargetError
from rankloom.settings import Count, Probability, Rank


@dataclass(frozen=True)
class MELoRA(Method):
    """`n` small LoRAs of rank `r`, scaled by `lora_alpha`/r; both are one number for all, or a list of n."""

    r: Rank | tuple[Rank, ...] = 8
    lora_alpha: float | tuple[float, ...] = 16.0
    lora_dropout: Probability = 0.0
    n: Count = 2

    def __post_init__(self) -> None:
        for setting in ("r", "lora_alpha"):
            value = getattr(self, setting)
            if isinstance(value, tuple) and len(value) != self.n:
                raise SettingsError(f"{setting}={value}: one number, or one for each of n={self.n} small LoRAs")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of each small LoRA."""
        return self.r if isinstance(self.r, tuple) else (self.r,) * self.n

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale of each small LoRA."""
        alphas = self.lora_alpha if isinstance(self.lora_alpha, tuple) else (self.lora_alpha,) * self.n
        return tuple(alpha / r for alpha, r in zip(alphas, self.ranks))

    def build(self, site: Site) -> Adapter:
        """The ensemble of one site."""
        site.needs_matrix("melora")
        for count, what in ((site.in_, "columns"), (site.out, "rows")):
            if count % self.n:
                raise TargetError(f"melora: site {site.name!r} has {count} {what}, not a multiple of n={self.n}")
        return MELoRAAdapter(site, self)


class MELoRAAdapter(Adapter):
    """A (…, R, in/n), B (…, out/n, R): the factors of the small LoRAs one after the other, R = Σ r_k."""

    roles = {"A": "in", "B": "out"}

    def __init__(self, site: Site, method: MELoRA) -> None:
        super().__init__(site.name)
        self.dropout = method.lora_dropout
        rank, n = sum(method.ranks), method.n
        self.A = site.empty(rank, site.in_ // n)
        self.B = site.empty(site.out // n, rank)
        ranks = torch.tensor(method.ranks, device=site.device)
        owner = torch.arange(n, device=site.device).repeat_interleave(ranks, output_size=rank)
        mine = (owner[:, None] == torch.arange(n, device=site.device)).to(site.dtype)
        scales = torch.tensor(method.scales, dtype=site.dtype, device=site.device)
        self.register_buffer("mine", mine, persistent=False)  # (R, n): 1 where the row is of the n-th small LoRA
        self.register_buffer("scaled", mine * scales, persistent=False)

    def reset(self, base: Base) -> None:
        bound = self.A.shape[-1] ** -0.5
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)

    def thin(self, base: Base, x: Any) -> Thin:
        a = (self.A.unsqueeze(-2) * self.mine[..., None]).flatten(-2)
        b = (self.B.unsqueeze(-3) * self.scaled.mT.unsqueeze(-2)).flatten(-3, -2)
        return Thin(a, b, dropout=self.dropout if self.training else 0.0)
