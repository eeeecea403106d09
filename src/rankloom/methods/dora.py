"""DoRA: the direction of each row comes from W plus an inner change, its length is trained on its own.

W' = diag(m / ‖W + ΔW‖_row)·(W + ΔW), m (out,) starting at ‖W‖_row; the norm is outside the graph by default.
Liu et al., ICML 2024, arXiv 2402.09353 eq. 5 and §4.3. The paper's text writes column norms; its released code, PEFT
and this file take one magnitude for each output row.

Any mergeable method may be the inner change. The inner dropout acts on the inner change only, not on W x.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankloom.core.adapter import Adapter
from rankloom.core.kinds import Base
from rankloom.core.method import Method
from rankloom.core.rule import Rule
from rankloom.core.site import Site
from rankloom.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(Method):
    """`inner`: the change that turns the rows; `detach_norm`: no gradient through the norm (the paper's cheap mode)."""

    inner: Method = field(default_factory=LoRA)
    detach_norm: bool = True

    def build(self, site: Site) -> Adapter | None:
        """DoRA around the inner adapter of one site."""
        site.needs_matrix("dora")
        inner = self.inner.build(site)
        return None if inner is None else DoRAAdapter(site, self, inner)

    def rules(self) -> list[Rule]:
        """The inner method's rules."""
        return self.inner.rules()


class DoRAAdapter(Adapter):
    """`magnitude` (…, out) around `inner`."""

    roles = {"magnitude": "magnitude"}
    peft_names = {"magnitude": "lora_magnitude_vector"}

    def __init__(self, site: Site, method: DoRA, inner: Adapter) -> None:
        super().__init__(site)
        self.detach_norm = method.detach_norm
        self.inner = inner
        self.magnitude = site.empty(site.out, 1)
        self.magnitude.data = self.magnitude.data.squeeze(-1)

    def reset(self, base: Base) -> None:
        self.inner.reset(base)
        with torch.no_grad():
            self.magnitude.copy_(torch.linalg.vector_norm(base.matrix().to(self.magnitude.dtype), dim=-1))

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        gain = self._gain(base).to(y.dtype)
        bias = base.bias()
        plain = y if bias is None else y - base.shift(y, bias)
        change: Tensor = base.scale(plain, gain - 1) + base.scale(self.inner(x, y, base), gain)
        return change

    def delta(self, base: Base) -> Tensor:
        matrix = base.matrix().to(self.magnitude.dtype)
        return self._gain(base)[..., None] * (matrix + self.inner.delta(base)) - matrix

    def _gain(self, base: Base) -> Tensor:
        with torch.no_grad() if self.detach_norm else nullcontext():
            norms = self.inner.row_norms(base).to(self.magnitude.dtype)
        return torch.where(norms > 0, self.magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)
