"""(IA)³: a trained vector scales what a layer gives, or what it is given.

y = l ∘ (W x + b), l (out), or in feed-forward layers y = W (l ∘ x) + b, l (in); l starts at one. Liu et al., NeurIPS
2022, arXiv 2205.05638 §3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.core.targets import leaves, matches
from rankloom.errors import TargetError, suggest


@dataclass(frozen=True)
class IA3(Method):
    """`feedforward_modules`: name suffixes (or one regular expression) of the layers whose input is scaled."""

    feedforward_modules: str | tuple[str, ...] = ()

    def build(self, site: Site) -> Adapter:
        """The vector of one site."""
        site.needs_matrix("ia3")
        return IA3Adapter(site, matches(self.feedforward_modules, site.name))

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """Nothing, once every name in `feedforward_modules` has met a module."""
        names = [name for name, _ in model.named_modules()]
        said = self.feedforward_modules
        for wanted in (said,) if isinstance(said, str) else said:
            if not any(matches(said if isinstance(said, str) else (wanted,), name) for name in names):
                raise TargetError(f"feedforward_modules: {wanted!r} matches nothing{suggest(wanted, leaves(names))}")
        return super().patch(model)


class IA3Adapter(Adapter):
    """`vector` (…, out), or (…, in channels) where `feedforward`."""

    roles = {"vector": "scale"}

    def __init__(self, site: Site, feedforward: bool) -> None:
        super().__init__(site.name)
        self.feedforward = feedforward
        self.groups = site.groups
        self.channels = site.groups * site.weight_shape[1] if site.kind.name in CONVS else site.in_
        self.vector = site.vector(self.channels if feedforward else site.out)

    def reset(self, base: Base) -> None:
        nn.init.ones_(self.vector)

    def delta(self, base: Base) -> Tensor:
        matrix = base.matrix().to(self.vector.dtype)
        return matrix * (self._by_column(matrix) if self.feedforward else (self.vector - 1)[..., None])

    def delta_bias(self, base: Base) -> Tensor | None:
        bias = None if self.feedforward else base.bias()
        return None if bias is None else (self.vector - 1) * bias.to(self.vector.dtype)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        if self.feedforward:
            return base.apply(x, self.delta(base).to(y.dtype))
        change: Tensor = base.scale(y, (self.vector - 1).to(y.dtype))
        return change

    def _by_column(self, matrix: Tensor) -> Tensor:
        """l − 1 for every entry of the matrix: each channel for its kernel, each row for the channels of its group."""
        if self.channels == matrix.shape[-1]:
            return (self.vector - 1)[..., None, :]
        own = (self.vector - 1).reshape(self.groups, -1)
        return own.repeat_interleave(matrix.shape[1] // own.shape[1], 1).repeat_interleave(
            len(matrix) // self.groups, 0
        )


CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
