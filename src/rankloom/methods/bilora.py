"""BiLoRA: vectors and values of a change in SVD form, trained on different data.

ΔW = s·P diag(e) Q with P (out, r), Q (r, in), s = lora_alpha/r; e comes from free numbers E as they are, by softmax
(e ≥ 0, Σe = 1), or by a sigmoid that a penalty drives to 0 or 1. P and Q are the lower level, E the upper one.
Qiang et al. 2024, arXiv 2403.13037 (there is no official code; the binary form and P = 0 at the start are our choices).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.rule import Rule, Run
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.rules.bilevel import Bilevel
from rankloom.settings import Count, NotNegative, Positive, Probability, Rank


@dataclass(frozen=True)
class BiLoRA(Method):
    """`r` pairs of vectors; `sv_param`: how e comes from E; `hypergrad`, `unroll`: as in the rule `Bilevel`, "none"
    trains both levels together; `gamma1` times Σ‖PᵀP − I‖² + ‖QQᵀ − I‖² is added to the lower loss, `gamma2` times
    Σe(1 − e) to the upper one where e is binary; `upper_lr`: rate of E.
    """

    inert: ClassVar[Mapping[str, str]] = {
        "unroll": "of two levels, which need two streams; without effect where hypergrad is 'none'",
        "upper_lr": "of two levels, as unroll",
        "gamma2": "of a binary e; without effect where sv_param is 'softmax' or 'real'",
    }
    r: Rank = 8
    lora_alpha: float = 8.0
    lora_dropout: Probability = 0.0
    sv_param: Literal["real", "softmax", "binary"] = "softmax"
    hypergrad: Literal["first", "finite_difference", "none"] = "finite_difference"
    unroll: Count = 1
    gamma1: NotNegative = 0.01
    gamma2: NotNegative = 0.01
    upper_lr: Positive = 1e-3

    def build(self, site: Site) -> Adapter:
        """BiLoRA of one site."""
        site.needs_matrix("bilora")
        return BiLoRAAdapter(site, self)

    def rules(self) -> list[Rule]:
        """The two levels, or the penalties of both in one."""
        if self.hypergrad == "none":
            return [Penalties(self.gamma1, self.gamma2)]
        settings: dict[str, Any] = {"lr": self.upper_lr, "unroll": self.unroll, "hypergrad": self.hypergrad}
        return [TwoLevels(gamma1=self.gamma1, gamma2=self.gamma2, **settings)]


class BiLoRAAdapter(Adapter):
    """A = Q (…, r, in), E (…, r, 1), B = P (…, out, r)."""

    roles = {"A": "in", "B": "out", "E": "singular"}

    def __init__(self, site: Site, method: BiLoRA) -> None:
        super().__init__(site.name)
        self.sv_param = method.sv_param
        self.scaling = method.lora_alpha / method.r
        self.dropout = method.lora_dropout
        self.A = site.empty(method.r, site.in_)
        self.E = site.empty(method.r, 1)
        self.B = site.empty(site.out, method.r)

    def extra_repr(self) -> str:
        return f"r={self.A.shape[-2]}, values={self.sv_param}, scaling={self.scaling:g}"

    def reset(self, base: Base) -> None:
        """Q, and P for real values, from N(0, 0.02²); E = 0, and P = 0 where e is not 0 then."""
        nn.init.normal_(self.A, std=0.02)
        nn.init.zeros_(self.E)
        if self.sv_param == "real":
            nn.init.normal_(self.B, std=0.02)
        else:
            nn.init.zeros_(self.B)

    def values(self) -> Tensor:
        """e (…, r)."""
        free = self.E.squeeze(-1)
        if self.sv_param == "softmax":
            return free.softmax(-1)
        return free.sigmoid() if self.sv_param == "binary" else free

    def thin(self, base: Base, x: Any) -> Thin:
        return Thin(self.A, self.B, self.scaling, inner=self.values(), dropout=self.dropout if self.training else 0.0)


@dataclass
class TwoLevels(Bilevel):
    """The levels of BiLoRA with their penalties."""

    gamma1: NotNegative = 0.0
    gamma2: NotNegative = 0.0

    def lower_penalty(self, run: Run) -> Tensor | float:
        return self.gamma1 * orthogonality(run) if self.gamma1 else 0.0

    def upper_penalty(self, run: Run) -> Tensor | float:
        return self.gamma2 * undecided(run) if self.gamma2 else 0.0


@dataclass
class Penalties(Rule):
    """Both penalties on one loss, for training both levels together."""

    gamma1: NotNegative = 0.0
    gamma2: NotNegative = 0.0

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """loss + γ₁R₁ + γ₂R₂."""
        full = loss + self.gamma1 * orthogonality(run) if self.gamma1 else loss
        return full + self.gamma2 * undecided(run) if self.gamma2 else full


def orthogonality(run: Run) -> Tensor:
    """Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖² over the trained BiLoRA adapters, 0-d."""
    grams = [gram for a in _each(run) for gram in (a.B.mT @ a.B, a.A @ a.A.mT)]
    each = [(g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)).square().sum() for g in grams]
    return torch.stack(each).sum()


def undecided(run: Run) -> Tensor | float:
    """Σ e(1 − e) over the binary ones; 0 where there is none."""
    each = [(e * (1 - e)).sum() for a in _each(run) if a.sv_param == "binary" for e in [a.values()]]
    return torch.stack(each).sum() if each else 0.0


def _each(run: Run) -> list[BiLoRAAdapter]:
    found = [a for name in run.bank.trained for _, a in run.bank.adapters(name, of=BiLoRAAdapter)]
    return [a for a in found if isinstance(a, BiLoRAAdapter)]
