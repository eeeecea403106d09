"""QA-LoRA: a change that is the same for all columns of a group, so a group's zero point can take it without loss.

y = W x + b + s·B A p, p_g = Σ x_j (or the mean) over the columns j of group g; A (r, groups), B (out, r),
s = lora_alpha/r. On a base kept as `Uniform` with groups of the same size the merge stays in 2–8 bits and is exact.
Xu et al., ICLR 2024, arXiv 2309.14717 §3.3; the released code takes the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.thin import Thin, dropped
from rankloom.errors import StateError, TargetError
from rankloom.settings import Count, Probability, Rank
from rankloom.store.base import Packed
from rankloom.store.uniform import Uniform, fold_into_zeros


@dataclass(frozen=True)
class QALoRA(Method):
    """`group_size` columns share their change (that of the base's store, to merge into it); `pool`: they are summed, or
    averaged; `lora_alpha` over r is the scale; `lora_dropout` on what was pooled. The base is as the plan has it: with
    `store=uniform start=gptq` it is quantised as in the paper, without a store it stays dense.
    """

    made_for: ClassVar[str] = "a base in groups, as in store=uniform start=gptq"

    r: Rank = 64
    lora_alpha: float = 16.0
    lora_dropout: Probability = 0.0
    group_size: Count = 32
    pool: Literal["sum", "mean"] = "mean"

    def build(self, site: Site) -> Adapter:
        """QA-LoRA of one linear layer."""
        if not site.kind.linear:
            raise TargetError(
                f"qa_lora: site {site.name!r} ({site.kind.name}) is no linear layer: no input columns to pool"
            )
        if site.in_ % self.group_size:
            raise TargetError(
                f"qa_lora: site {site.name!r} has {site.in_} columns, not a multiple of group_size={self.group_size}"
            )
        return QALoRAAdapter(site, self)


class QALoRAAdapter(Adapter):
    """A (r, groups), B (out, r)."""

    roles = {"A": "in", "B": "out"}
    peft_names = {"A": "lora_A.weight", "B": "lora_B.weight"}
    more_than_thin = "its dropout acts on pooled columns, not on the layer's input"

    def __init__(self, site: Site, method: QALoRA) -> None:
        super().__init__(site.name)
        self.group = method.group_size
        self.scaling = method.lora_alpha / method.r
        self.share = 1 / method.group_size if method.pool == "mean" else 1.0
        self.dropout = method.lora_dropout
        self.A = site.empty(method.r, site.in_ // method.group_size)
        self.B = site.empty(site.out, method.r)

    def extra_repr(self) -> str:
        return f"r={self.A.shape[-2]}, group={self.group}, scaling={self.scaling:g}"

    def reset(self, base: Base) -> None:
        bound = math.sqrt(6 / sum(self.A.shape[-2:]))
        nn.init.uniform_(self.A, -bound, bound)
        nn.init.zeros_(self.B)

    def thin(self, base: Base, x: Any) -> Thin | None:
        """None where what was pooled is dropped out: that is no dropout of the input."""
        if self.dropout and self.training:
            return None
        return Thin(self.share * self.A.repeat_interleave(self.group, dim=-1), self.B, self.scaling)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        pooled = x.unflatten(-1, (-1, self.group)).sum(-1) * self.share
        h = base.down(dropped(pooled, y, self.dropout if self.training else 0.0), self.A.to(y.dtype))
        return base.up(h, self.B.to(y.dtype) * self.scaling)

    def by_group(self) -> Tensor:
        """The change of every weight of a group, (out, groups)."""
        return (self.scaling * self.share) * (self.B @ self.A)

    def delta(self, base: Base) -> Tensor:
        return self.by_group().repeat_interleave(self.group, dim=-1)

    def repacked(self, base: Base, weight: float) -> Tensor | None:
        now = base.kind.tensor(base.layer)
        fits = isinstance(now, Packed) and isinstance(now.store, Uniform) and now.store.group == self.group
        return self.merged(base, weight) if fits else None

    def merged(self, base: Base, weight: float = 1.0) -> Packed:
        """The packed base weight with weight·ΔW in its zero points: still packed, and without loss.

        Raises `StateError` for a dense base, `SettingsError` for another store or group size.
        """
        packed = base.kind.tensor(base.layer)
        if not isinstance(packed, Packed):
            raise StateError(
                f"{self.site_name!r} is not packed: merge into the dense weight, or pack it as Uniform first"
            )
        return fold_into_zeros(packed, weight * self.by_group())
