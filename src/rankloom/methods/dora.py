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

from rankloom.core.adapter import Adapter, Thin, take_dropout, thin_of
from rankloom.core.fuse import square_norms
from rankloom.core.kinds import Base
from rankloom.core.method import Method
from rankloom.core.rule import Rule
from rankloom.core.site import Site
from rankloom.core.targets import matches
from rankloom.errors import TargetError, suggest
from rankloom.methods.lora import LoRA, drop


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
        return self.inner.patch(model)

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
        self.dropout = take_dropout(inner)
        self.inner = inner
        self.magnitude = site.empty(site.out, 1)
        self.magnitude.data = self.magnitude.data.squeeze(-1)

    def reset(self, base: Base) -> None:
        self.inner.reset(base)
        with torch.no_grad():
            self.magnitude.copy_(self.inner.row_norms(base))

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        factor = self._gain(base).to(y.dtype)
        dropped = drop(x, y, self.dropout, self.training)
        plain = self._plain(dropped, y, base)
        change: Tensor = base.scale(plain, factor - 1) + base.scale(self.inner(dropped, y, base), factor)
        return change

    def thin(self, base: Base) -> Thin | None:
        inner = thin_of(self.inner, base)
        if inner is None or not self.detach_norm or (self.dropout and self.training):
            return None
        return inner._replace(magnitude=self.magnitude, square=square_norms(base))

    def _plain(self, dropped: Any, y: Tensor, base: Base) -> Tensor:
        """W x without bias: the output at hand, or computed again where dropout changed the input."""
        if self.dropout and self.training:
            return base.apply(dropped, base.matrix().to(y.dtype))
        return base.unbiased(y)

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
        super().__init__(site)
        self.detach_norm = method.detach_norm
        self.dropout = take_dropout(inner)
        self.inner = inner
        self.magnitude = nn.Parameter(site.empty(site.in_, 1).data.squeeze(-1))

    def reset(self, base: Base) -> None:
        self.inner.reset(base)
        with torch.no_grad():
            self.magnitude.copy_(torch.linalg.vector_norm(base.matrix().to(self.magnitude.dtype), dim=-2))

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = base.apply(drop(x, y, self.dropout, self.training), self.delta(base).to(y.dtype))
        shift = self.delta_bias(base)
        return change if shift is None else change + base.shift(y, shift.to(y.dtype))

    def delta_bias(self, base: Base) -> Tensor | None:
        return self.inner.delta_bias(base)

    def delta(self, base: Base) -> Tensor:
        matrix = base.matrix().to(self.magnitude.dtype)
        turned = matrix + self.inner.delta(base)
        norms = torch.linalg.vector_norm(turned.detach() if self.detach_norm else turned, dim=-2)
        return turned * gain(self.magnitude, norms)[..., None, :] - matrix


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """magnitude / norms, and 1 where the norm is zero."""
    living = norms > 0
    return torch.where(living, magnitude / torch.where(living, norms, 1.0), 1.0)
