"""DoRA: the direction of each row comes from W plus an inner change, its length is trained on its own.

W' = diag(m / ‖W + ΔW‖_row)·(W + ΔW), m (out,) starting at ‖W‖_row; the norm is outside the graph by default.
Liu et al., ICML 2024, arXiv 2402.09353 eq. 5 and §4.3. The paper's text writes column norms (`norm_axis="column"`); its
released code and PEFT take one magnitude for each output row, and so does the default here.

Any mergeable method may be the inner change. Its dropout acts on the input of W too, with the same mask, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter, take_dropout, thin_of
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.targets import matches
from rankloom.core.thin import Thin, dropped, gain
from rankloom.errors import TargetError, suggest
from rankloom.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(Method):
    """`inner`: the change that turns the rows; `detach_norm`: no gradient through the norm (the paper's cheap mode);
    `norm_axis`: one magnitude a row, or a column; `magnitude_only_modules`: name suffixes of sites whose inner change
    stays at its start, so that only the magnitude is trained.
    """

    inner: Method = field(default_factory=LoRA)
    detach_norm: bool = True
    norm_axis: Literal["row", "column"] = "row"
    magnitude_only_modules: tuple[str, ...] = ()

    def build(self, site: Site) -> Adapter | None:
        """DoRA around the inner adapter of one site."""
        site.needs_matrix("dora")
        inner = self.inner.build(site)
        if inner is None:
            return None
        if matches(self.magnitude_only_modules, site.name):
            inner.requires_grad_(False)
        return DoRAAdapter(site, self, inner) if self.norm_axis == "row" else ColumnDoRAAdapter(site, self, inner)

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """The inner method's patch, once every name in `magnitude_only_modules` has met a module."""
        names = [name for name, _ in model.named_modules()]
        for wanted in self.magnitude_only_modules:
            if not any(matches((wanted,), name) for name in names):
                leaves = {name.rsplit(".", 1)[-1] for name in names}
                raise TargetError(f"magnitude_only_modules: {wanted!r} matches nothing{suggest(wanted, leaves)}")
        return super().patch(model)


class DoRAAdapter(Adapter):
    """`magnitude` (…, out) around `inner`."""

    roles = {"magnitude": "magnitude"}
    peft_names = {"magnitude": "lora_magnitude_vector"}
    more_than_thin = "its norm has a gradient, or its inner change is more than thin or depends on the input"

    def __init__(self, site: Site, method: DoRA, inner: Adapter) -> None:
        super().__init__(site.name)
        self.detach_norm = method.detach_norm
        self.dropout = take_dropout(inner)
        self.inner = inner
        self.magnitude = site.vector(site.out)

    def reset(self, base: Base) -> None:
        self.inner.reset(base)
        with torch.no_grad():
            self.magnitude.copy_(self.inner.row_norms(base))

    def thin(self, base: Base, x: Any) -> Thin | None:
        """None where the norm has a gradient, or the inner change is more than thin or depends on its input."""
        inner = thin_of(self.inner, base, x) if self.detach_norm else None
        if inner is None or inner.by_token or inner.magnitude is not None:
            return None
        return inner._replace(magnitude=self.magnitude, dropout=self.dropout if self.training else 0.0)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        if self.thin(base, x) is not None:
            return super().forward(x, y, base)
        p = self.dropout if self.training else 0.0
        x, factor = dropped(x, y, p), self._gain(base).to(y.dtype)
        plain = base.apply(x, base.matrix().to(y.dtype)) if p else base.unbiased(y)
        change: Tensor = base.scale(plain, factor - 1) + base.scale(self.inner(x, y, base), factor)
        return change

    def delta(self, base: Base) -> Tensor:
        matrix = base.matrix().to(self.magnitude.dtype)
        return self._gain(base)[..., None] * (matrix + self.inner.delta(base)) - matrix

    def delta_bias(self, base: Base) -> Tensor | None:
        shift = self.inner.delta_bias(base)
        return None if shift is None else self._gain(base) * shift

    def _gain(self, base: Base) -> Tensor:
        with torch.no_grad() if self.detach_norm else nullcontext():
            norms = self.inner.row_norms(base).to(self.magnitude.dtype)
        return gain(self.magnitude, norms)


class ColumnDoRAAdapter(Adapter):
    """`magnitude` (…, in) around `inner`: W' = (W + ΔW)·diag(m / ‖W + ΔW‖_column). Builds its matrix at every call."""

    roles = {"magnitude": "magnitude"}

    def __init__(self, site: Site, method: DoRA, inner: Adapter) -> None:
        super().__init__(site.name)
        self.detach_norm = method.detach_norm
        self.dropout = take_dropout(inner)
        self.inner = inner
        self.magnitude = site.vector(site.in_)

    def reset(self, base: Base) -> None:
        self.inner.reset(base)
        with torch.no_grad():
            self.magnitude.copy_(torch.linalg.vector_norm(base.matrix().to(self.magnitude.dtype), dim=-2))

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = base.apply(dropped(x, y, self.dropout if self.training else 0.0), self.delta(base).to(y.dtype))
        shift = self.delta_bias(base)
        return change if shift is None else change + base.shift(y, shift.to(y.dtype))

    def delta_bias(self, base: Base) -> Tensor | None:
        return self.inner.delta_bias(base)

    def delta(self, base: Base) -> Tensor:
        matrix = base.matrix().to(self.magnitude.dtype)
        turned = matrix + self.inner.delta(base)
        norms = torch.linalg.vector_norm(turned.detach() if self.detach_norm else turned, dim=-2)
        return turned * gain(self.magnitude, norms)[..., None, :] - matrix
