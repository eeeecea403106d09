"""AdaLoRA: a change in SVD form whose ranks are re-allotted between layers while it trains.

ΔW = (lora_alpha / (init_r + 1e-5))·B diag(E) A; the divisor keeps the initial rank. A penalty keeps A's rows and B's
columns orthonormal; the rule `Budget` zeroes the least important triplets. Zhang et al., ICLR 2023, arXiv 2303.10512.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.rule import Rule, Run
from rankloom.core.site import Site
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError
from rankloom.rules.budget import Budget
from rankloom.rules.orthogonal import Orthogonal
from rankloom.settings import Count, NotNegative, Probability, Rank, Steps


@dataclass(frozen=True)
class AdaLoRA(Method):
    """`init_r` triplets for each site at first, `target_r` on average at last; from step `tinit` until `tfinal` steps
    are left the budget falls by a cubic, re-allotted every `deltaT` steps; `beta1`, `beta2` smooth the importance;
    `metric`: importance "ipt" (sensitivity times its deviation) or magnitude "mag"; lora_alpha ≤ 0 means `init_r`.
    """

    init_r: Rank = 12
    target_r: Rank = 8
    lora_alpha: float = 8.0
    lora_dropout: Probability = 0.0
    tinit: Steps = 0
    tfinal: Steps = 0
    deltaT: Count = 1
    beta1: Probability = 0.85
    beta2: Probability = 0.85
    orth_reg_weight: NotNegative = 0.5
    metric: Literal["ipt", "mag"] = "ipt"

    def __post_init__(self) -> None:
        if self.target_r > self.init_r:
            raise SettingsError(f"target_r={self.target_r} is above init_r={self.init_r}: the budget can only shrink")
        self._budget()

    def build(self, site: Site) -> Adapter:
        """AdaLoRA of one site."""
        site.needs_matrix("adalora")
        return AdaLoRAAdapter(site, self)

    def rules(self) -> list[Rule]:
        """The budget and the orthogonality penalty."""
        return [self._budget(), Orthogonal(self.orth_reg_weight)]

    def _budget(self) -> Budget:
        return Budget(self.target_r, self.tinit, self.tfinal, self.deltaT, self.beta1, self.beta2, self.metric)


class AdaLoRAAdapter(Adapter):
    """A (…, r, in), E (…, r, 1), B (…, out, r)."""

    roles = {"A": "in", "B": "out", "E": "singular"}
    peft_names = {"A": "lora_A", "B": "lora_B", "E": "lora_E"}

    def __init__(self, site: Site, method: AdaLoRA) -> None:
        super().__init__(site.name)
        alpha = method.lora_alpha if method.lora_alpha > 0 else method.init_r
        self.scaling = alpha / (method.init_r + 1e-5)
        self.dropout = method.lora_dropout
        self.A = site.empty(method.init_r, site.in_)
        self.E = site.empty(method.init_r, 1)
        self.B = site.empty(site.out, method.init_r)

    def extra_repr(self) -> str:
        return f"r={self.A.shape[-2]}, scaling={self.scaling:g}"

    def reset(self, base: Base) -> None:
        nn.init.normal_(self.A, std=0.02)
        nn.init.zeros_(self.E)
        nn.init.normal_(self.B, std=0.02)

    def thin(self, base: Base, x: Any) -> Thin:
        p = self.dropout if self.training else 0.0
        return Thin(self.A, self.B, self.scaling, inner=self.E.squeeze(-1), dropout=p)


def compact(adapter: AdaLoRAAdapter, run: Run | None = None) -> int:
    """Drop the triplets whose E is zero (at least one is kept); the change stays the same. Returns the rank left.

    In a training give the `run`: its optimizer keeps the memory of the triplets that stay.
    """
    if adapter.E.ndim != 2:
        raise SettingsError(
            f"{adapter.site_name}: stacked experts have ranks of their own and cannot be compacted together"
        )
    keep = (adapter.E.detach() != 0).flatten().nonzero().flatten()
    keep = keep if keep.numel() else keep.new_zeros(1)
    for name, dim in adapter.rank_dims().items():
        old = adapter.get_parameter(name)
        new = old.detach().index_select(dim, keep)
        if run is None:
            setattr(adapter, name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            run.replace(old, new, (dim, keep))
    return keep.numel()
