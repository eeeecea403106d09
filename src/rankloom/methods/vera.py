"""VeRA: one frozen random pair for the whole model, two trained vectors for each layer.

ΔW_l = diag(b_l) B diag(d_l) A, A (r, widest in) and B (widest out, r) cut to the layer; at start b = 0, d = d_initial.
Kopiczko et al., ICLR 2024, arXiv 2310.11454 eq. 2. The pair comes from `projection_prng_key` on the CPU, so it is the
same on every device and can be left out of the file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError
from rankloom.settings import Probability, Rank, Seed


@dataclass(frozen=True)
class VeRA(Method):
    """`r` of the shared pair; `d_initial` start of d; `save_projection`: the file holds the pair, not just its key."""

    r: Rank = 256
    projection_prng_key: Seed = 0
    save_projection: bool = True
    vera_dropout: Probability = 0.0
    d_initial: float = 0.1

    def build(self, site: Site) -> Adapter:
        """VeRA of one site; the first site makes the shared pair."""
        site.needs_matrix("vera")
        return VeRAAdapter(site, self)


class VeRAAdapter(Adapter):
    """`lambda_b` (…, out), `lambda_d` (…, r); borrows A and B, which the first site fills from the key."""

    roles = {"lambda_b": "scale", "lambda_d": "scale"}
    peft_names = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}

    def __init__(self, site: Site, method: VeRA) -> None:
        super().__init__(site.name)
        self.dropout = method.vera_dropout
        self.d_initial = method.d_initial
        self.lambda_b = site.vector(site.out)
        self.lambda_d = site.vector(method.r)
        out, in_ = site.widest
        for key, shape in (("vera_A", (method.r, in_)), ("vera_B", (out, method.r))):
            make = partial(torch.empty, shape, dtype=site.dtype, device=site.device)
            site.shared.provide(key, make, role="basis", trainable=False)
        self.borrow(site.shared, A="vera_A", B="vera_B")
        if self.A.shape[0] != method.r:
            raise SettingsError(
                f"vera: {site.name!r} asks for r={method.r}, but all sites share one pair of rank {self.A.shape[0]}; "
                "leave VeRA out of rank_pattern"
            )
        self.out, self.in_ = site.out, site.in_
        self.key = method.projection_prng_key if site.index == 0 else None

    def reset(self, base: Base) -> None:
        nn.init.zeros_(self.lambda_b)
        nn.init.constant_(self.lambda_d, self.d_initial)
        if self.key is not None:
            generator = torch.Generator().manual_seed(self.key)
            with torch.no_grad():
                for shared in (self.A, self.B):
                    shared.copy_(projection(tuple(shared.shape), generator))

    def thin(self, base: Base, x: Any) -> Thin:
        p = self.dropout if self.training else 0.0
        a, b = self.A[:, : self.in_], self.B[: self.out]
        return Thin(a, b, inner=self.lambda_d, outer=self.lambda_b, dropout=p)


def projection(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform (bound √3·√2/√fan_in) float32 matrix on the CPU."""
    bound = math.sqrt(3) * math.sqrt(2 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
