"""Blend: a gate over adapters that the bank has already.

Δy = γ·Σ_i w_i·Δy_i over the members, w (…, k) from the gate. The members are frozen and stay adapters of their own, of
any methods and ranks; where all are thin, the blend is one thin form of rank Σr. LoRA-Flow, arXiv 2402.11455; X-LoRA,
arXiv 2402.07148.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core import thin as forms
from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.gate import Gate, spread
from rankloom.core.method import Method, together
from rankloom.core.site import Site
from rankloom.core.slots import slot_table
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError, TargetError
from rankloom.gates.block import Block


@dataclass(frozen=True)
class Blend(Method):
    """`adapters`: names of the members, which have to be in the bank; `gate`: their weights; `scale` γ of them all.

    It is attached where any member is, and to be used alone: `bank.use("blend")`. The members do not train while the
    blend is in the bank. A saved blend names them; they have their own files.
    """

    adapters: tuple[str, ...] = ()
    gate: Gate = field(default_factory=lambda: Block(bias="outside"))
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))
        if len(set(self.adapters)) < len(self.adapters):
            raise SettingsError(f"adapters={self.adapters}: each member once")

    def needs(self) -> tuple[str, ...]:
        """The members."""
        return self.adapters

    def build(self, site: Site) -> Adapter:
        """The router of one site."""
        if not self.adapters:
            raise TargetError(
                f"blend: nothing to blend at {site.name!r} ({site.kind.name}): Blend(adapters=('a', 'b')) names "
                "adapters of the bank"
            )
        if not self.gate.constant:
            site.needs_input("blend")
            site.needs_linear("blend", f"its gate {type(self.gate).__name__} routes the tokens of linear layers only")
        return BlendAdapter(site, self)

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """Freeze the members, and what the gate changes."""
        bank: Any = model.rankloom
        own = [p for name in self.adapters for _, p, _ in bank.tensors(name) if p.requires_grad]
        for parameter in own:
            parameter.requires_grad_(False)
        return together([partial(_train_again, own), self.gate.patch(model)])


def _train_again(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)


class BlendAdapter(Adapter):
    """`gate`: the router over the members, which are read from the layer by name."""

    roles = {"gate": "router"}

    def __init__(self, site: Site, method: Blend) -> None:
        super().__init__(site.name)
        self.adapters, self.scale, self.slot = method.adapters, method.scale, site.slot
        self.gate = method.gate.build(site, len(method.adapters))

    def extra_repr(self) -> str:
        return f"adapters={self.adapters}"

    def reset(self, base: Base) -> None:
        self.gate.reset()

    def weights(self, x: Any, base: Base) -> Tensor:
        """Weights (k,), or (…, k) by row or token, of the members for input x; float32."""
        return spread(self.gate(x, base), x, base)

    def thin(self, base: Base, x: Any) -> Thin | None:
        """None where a member is more than thin, or has dropout or a bias by token."""
        parts = [(i, member.thin(base, x)) for i, member in self._members(base)]
        if not parts or any(thin is None or thin.magnitude is not None or thin.dropout for _, thin in parts):
            return None
        weights = self.weights(x, base) * self.scale
        if weights.ndim > 1 and any(thin is not None and thin.bias is not None for _, thin in parts):
            return None
        return forms.joined([(_weighed(thin, weights[..., i]), 1.0) for i, thin in parts if thin is not None])

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        thin = self.thin(base, x)
        if thin is not None:
            return forms.change(thin, x, y, base)
        weights = self.weights(x, base).to(y.dtype) * self.scale
        total = torch.zeros_like(y)
        for i, member in self._members(base):
            change: Tensor = member(x, y, base)
            share = weights[..., i]
            total = total + share.reshape(*share.shape, *(1,) * (change.ndim - share.ndim)) * change
        return total

    def delta(self, base: Base) -> Tensor:
        weights = self.weights(None, base) * self.scale
        each = [weights[i] * member.delta(base) for i, member in self._members(base)]
        return torch.stack(each).sum(0) if each else torch.zeros_like(base.matrix())

    def delta_bias(self, base: Base) -> Tensor | None:
        weights = self.weights(None, base) * self.scale
        each = [weights[i] * b for i, m in self._members(base) if (b := m.delta_bias(base)) is not None]
        return torch.stack(each).sum(0) if each else None

    def _members(self, base: Base) -> list[tuple[int, Adapter]]:
        """Those that this layer has, with their numbers."""
        table = slot_table(base.layer, self.slot)
        return [(i, table[name]) for i, name in enumerate(self.adapters) if name in table]


def _weighed(thin: Thin, weight: Tensor) -> Thin:
    """A thin form times a weight, of no dims or by token."""
    own = thin.A.new_ones(()).expand(thin.A.shape[:-1]) if thin.inner is None else thin.inner
    bias = thin.bias if thin.bias is None else weight * thin.bias
    return thin._replace(inner=weight[..., None] * own, bias=bias)
