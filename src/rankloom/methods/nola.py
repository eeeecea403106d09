"""NOLA: each factor is a trained combination of random matrices that are never stored.

A = A₀ + Σ_k a_k A_k, B = Σ_k b_k B_k, ΔW = (lora_alpha/r) B A, with A_k, B_k uniform in ±1/√K and A₀ in ±1/√in; a and b
start at 0 and are all that is trained and saved. Koohpayegani et al., ICLR 2024, arXiv 2310.02556 §3.

The random matrices are a function of `seed`, the site's name and their index alone, computed from a counter: the same
on every device and in every block, made again in backward, and no generator of the program is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from zlib import crc32

from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.methods.lora import scale_of
from rankloom.ops.counter import combined, uniform
from rankloom.settings import Count, Probability, Rank, Seed


@dataclass(frozen=True)
class NOLA(Method):
    """`num_basis_A`, `num_basis_B`: random matrices, and trained numbers, of each factor; `seed` of the matrices;
    `chunk`: how many are in memory at once.
    """

    r: Rank = 16
    lora_alpha: float = 4.0
    lora_dropout: Probability = 0.0
    num_basis_A: Count = 512
    num_basis_B: Count = 512
    seed: Seed = 0
    chunk: Count = 32

    inert: ClassVar = {"chunk": "bounds memory; the sum is the same"}

    def build(self, site: Site) -> Adapter:
        """The coefficients of one site."""
        site.needs_matrix("nola")
        return NOLAAdapter(site, self)


class NOLAAdapter(Adapter):
    """`a` (…, num_basis_A), `b` (…, num_basis_B)."""

    roles = {"a": "coefficient", "b": "coefficient"}

    def __init__(self, site: Site, method: NOLA) -> None:
        super().__init__(site.name)
        self.scaling = scale_of(method.lora_alpha, method.r, "standard")
        self.dropout = method.lora_dropout
        self.chunk = method.chunk
        self.shapes = ((method.r, site.in_), (site.out, method.r))
        self.keys = tuple(crc32(f"{method.seed}:{site.name}:{factor}".encode()) for factor in ("A0", "A", "B"))
        self.a = site.vector(method.num_basis_A)
        self.b = site.vector(method.num_basis_B)

    def reset(self, base: Base) -> None:
        nn.init.zeros_(self.a)
        nn.init.zeros_(self.b)

    def thin(self, base: Base, x: Any) -> Thin:
        a, b = self.factors()
        return Thin(a, b, self.scaling, dropout=self.dropout if self.training else 0.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (…, r, in), B (…, out, r)."""
        (rank, in_), _ = self.shapes
        start = uniform(self.keys[0], 0, 1, (rank, in_), self.a.device).squeeze(0).to(self.a.dtype) * in_**-0.5
        a = combined(self.a * self.a.shape[-1] ** -0.5, self.keys[1], self.shapes[0], self.chunk)
        b = combined(self.b * self.b.shape[-1] ** -0.5, self.keys[2], self.shapes[1], self.chunk)
        return start + a, b
