"""Tied-LoRA: one trained pair of factors for all layers of a shape, and two vectors for each layer.

Δy_l = s·v_l ∘ B (u_l ∘ A x), s = lora_alpha/r, with A (r, in), B (out, r) shared and u_l (r,), v_l (out,) of the layer.
Any of A, B, u, v may be trained; what is not keeps its start, u and v at 1. A starts random and B at 0; a B that is
kept is random, and v starts at 0. Renduchintala et al., NAACL 2024, arXiv 2311.09578 §3. LoRA is the untied case
without vectors, VeRA the one with A and B kept. Every layer adds to the gradient of A and B: mind the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.targets import matches
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError, TargetError
from rankloom.methods.lora import scale_of
from rankloom.settings import Probability, Rank


@dataclass(frozen=True)
class TiedLoRA(Method):
    """`train`: which of A, B, u, v are trained, B or v among them; `tie_scope`: which layers of one shape share A and
    B: all ("shape"), those of one name ("name"), or groups of name suffixes, [["q_proj", "k_proj"], ["o_proj"]].
    """

    r: Rank = 8
    lora_alpha: float = 8.0
    lora_dropout: Probability = 0.0
    train: tuple[Literal["A", "B", "u", "v"], ...] = ("A", "B", "u", "v")
    tie_scope: Literal["shape", "name"] | tuple[tuple[str, ...], ...] = "shape"

    examples: ClassVar = {"train": (("A", "B"),)}

    def __post_init__(self) -> None:
        if not {"B", "v"} & set(self.train):
            raise SettingsError(f"train={self.train}: B or v has to be trained, as the change starts at zero by them")

    def build(self, site: Site) -> Adapter:
        """The vectors of one site, and the pair that it shares."""
        site.needs_matrix("tied_lora")
        return TiedLoRAAdapter(site, self, self._group(site))

    def _group(self, site: Site) -> str:
        if isinstance(self.tie_scope, str):
            return "" if self.tie_scope == "shape" else site.name.rpartition(".")[2]
        for number, names in enumerate(self.tie_scope):
            if matches(names, site.name):
                return str(number)
        raise TargetError(f"tied_lora: site {site.name!r} is in no group of tie_scope={self.tie_scope}")


class TiedLoRAAdapter(Adapter):
    """`u` (…, r) and `v` (…, out) where they are trained; borrows A and B, which the first site of a group fills."""

    roles = {"u": "scale", "v": "scale"}

    def __init__(self, site: Site, method: TiedLoRA, group: str) -> None:
        super().__init__(site.name)
        self.scaling = scale_of(method.lora_alpha, method.r, "standard")
        self.dropout = method.lora_dropout
        self.u = site.vector(method.r) if "u" in method.train else None
        self.v = site.vector(site.out) if "v" in method.train else None
        keys, self.first = {}, False
        for name, role, shape in (("A", "in", (method.r, site.in_)), ("B", "out", (site.out, method.r))):
            keys[name] = f"tied_{name}_{group}_{site.kind.name}_{site.out}x{site.in_}"
            make = partial(torch.empty, shape, dtype=site.dtype, device=site.device)
            self.first |= site.shared.provide(keys[name], make, role=role, trainable=name in method.train)
        self.borrow(site.shared, **keys)
        if self.A.shape[0] != method.r:
            raise SettingsError(
                f"tied_lora: {site.name!r} asks for r={method.r}, but shares factors of rank {self.A.shape[0]}; leave "
                "TiedLoRA out of rank_pattern"
            )

    def reset(self, base: Base) -> None:
        if self.first:
            bound = self.A.shape[1] ** -0.5
            nn.init.uniform_(self.A, -bound, bound)
            nn.init.zeros_(self.B) if self.B.requires_grad else nn.init.kaiming_uniform_(self.B)
        if self.u is not None:
            nn.init.ones_(self.u)
        if self.v is not None:
            nn.init.constant_(self.v, float(self.B.requires_grad))

    def thin(self, base: Base, x: Any) -> Thin:
        p = self.dropout if self.training else 0.0
        return Thin(self.A, self.B, self.scaling, inner=self.u, outer=self.v, dropout=p)
