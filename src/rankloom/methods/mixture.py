"""Mixture: n experts of any method at every site, and a gate that weighs them.

Δy = Σ_i w_i·Δy_i, w (…, n) from the gate. The experts are one adapter with n as first dim of its tensors; where they
are thin, a dense mixture is one thin form of rank n·r, Δy = [B_1 … B_n] diag(w ⊗ 1_r) [A_1; …; A_n] x·s, and a sparse
one (top-k) computes what the tokens chose. MoLoRA, arXiv 2309.05444; HydraLoRA (`share=("A",)`), arXiv 2404.19245.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.core import thin as forms
from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.gate import Gate, spread
from rankloom.core.method import Method, together
from rankloom.core.site import Site
from rankloom.core.stack import Stacked, mixed, mixes, stacked, stacked_base
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError, TargetError, suggest
from rankloom.gates.constant import Constant
from rankloom.gates.linear import Linear
from rankloom.gates.topk import TopK
from rankloom.methods.lora import LoRA
from rankloom.ops.dispatch import dispatched


@dataclass(frozen=True)
class Mixture(Method):
    """`n` experts of `inner`, weighed by `gate`; a tuple has an n for each block of the model. `share`: names of the
    inner method's tensors that all experts of a site have in common.

    The experts see the same dropped-out input. With a `constant` gate the mixture merges; else it cannot, its change
    depends on the input.
    """

    examples: ClassVar = {"gate": (TopK(1), Constant()), "share": (("A",), ("B",))}
    inner: Method = field(default_factory=LoRA)
    n: int | tuple[int, ...] = 4
    gate: Gate = field(default_factory=Linear)
    share: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.n if isinstance(self.n, tuple) else (self.n,), default=0) < 1:
            raise SettingsError(f"n={self.n}: at least one expert")

    def build(self, site: Site) -> Adapter | None:
        """The experts and the router of one site."""
        site.needs_matrix("mixture")
        if isinstance(site.kind, Stacked):
            raise TargetError(f"mixture: {site.name!r} is one expert of a mixture already; mixtures do not nest")
        if not self.gate.constant:
            site.needs_input("mixture")
            site.needs_linear("mixture", f"its gate {type(self.gate).__name__} routes the tokens of linear layers only")
        n = self._n_at(site)
        inner = self.inner.build(stacked(site, n))
        if inner is None:
            return None
        _check_stacked(inner, n, self.inner, site)
        _share(inner, self.share, self.inner)
        return MixtureAdapter(site, self, inner, n)

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """What the inner method and the gate change."""
        return together([super().patch(model), self.gate.patch(model)])

    def _n_at(self, site: Site) -> int:
        if isinstance(self.n, int):
            return self.n
        if site.block is None or site.block >= len(self.n):
            where = "outside of any block" if site.block is None else f"in block {site.block}"
            raise SettingsError(f"n={self.n} is for blocks 0 to {len(self.n) - 1}; {site.name!r} lies {where}")
        return self.n[site.block]


def _check_stacked(inner: Adapter, n: int, method: Method, site: Site) -> None:
    for path, parameter in inner.named_parameters():
        if parameter.shape[:1] != (n,):
            raise TargetError(
                f"mixture: {type(method).__name__} cannot be stacked at {site.name!r}: its {path!r} has the shape "
                f"{tuple(parameter.shape)} for {n} experts"
            )


def _share(inner: Adapter, names: tuple[str, ...], method: Method) -> None:
    """Give the tensors of these names no first dim."""
    own = {path: path.rpartition(".")[2] for path, _ in inner.named_parameters()}
    for name in names:
        if name not in own.values():
            raise SettingsError(f"share: {type(method).__name__} has no tensor {name!r}{suggest(name, own.values())}")
    for path, leaf in own.items():
        if leaf in names:
            owner = inner.get_submodule(path.rpartition(".")[0])
            old = owner.get_parameter(leaf)
            setattr(owner, leaf, nn.Parameter(old.detach()[0].clone(), requires_grad=old.requires_grad))


class MixtureAdapter(Adapter):
    """`experts`: the inner adapter, its tensors stacked (n, …); `gate`: the router of the site."""

    roles = {"gate": "router"}

    def __init__(self, site: Site, method: Mixture, inner: Adapter, n: int) -> None:
        super().__init__(site.name)
        self.n = n
        self.experts = inner
        self.gate = method.gate.build(site, n)

    def extra_repr(self) -> str:
        return f"n={self.n}"

    def reset(self, base: Base) -> None:
        self.experts.reset(stacked_base(base, self.n))
        self.gate.reset()

    def weights(self, x: Any, base: Base) -> Tensor:
        """Weights (n,), or (…, n) by row or token, of the experts for input x; float32."""
        return spread(self.gate(x, base), x, base)

    def thin(self, base: Base, x: Any) -> Thin | None:
        """None where the experts are more than thin, or only some of them are computed."""
        inner = self._experts_thin(base, x)
        if inner is None or self._sparse(x, base):
            return None
        weights = self.weights(x, base)
        return None if inner.bias is not None and weights.ndim > 1 else mixed(inner, weights)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        inner, weights = self._experts_thin(base, x), self.weights(x, base)
        if inner is None:
            return self._summed(x, y, base, weights)
        if self._sparse(x, base):
            change = self._dispatched(x, y, inner, weights)
        else:
            change = forms.change(mixed(inner._replace(bias=None), weights), x, y, base)
        if inner.bias is None:
            return change
        return change + base.shift(y, torch.matmul(weights.to(y.dtype), inner.bias.to(y.dtype)))

    def delta(self, base: Base) -> Tensor:
        if self._experts_thin(base, None) is not None:
            return super().delta(base)
        each: Tensor = self.experts.delta(stacked_base(base, self.n))
        mean: Tensor = torch.tensordot(self.weights(None, base).to(each), each, 1)
        return mean

    def delta_bias(self, base: Base) -> Tensor | None:
        each = self.experts.delta_bias(stacked_base(base, self.n))
        return None if each is None else torch.tensordot(self.weights(None, base).to(each), each, 1)

    def _experts_thin(self, base: Base, x: Any) -> Thin | None:
        found = self.experts.thin(stacked_base(base, self.n), x)
        return found if mixes(found) else None

    def _sparse(self, x: Any, base: Base) -> bool:
        """Whether tokens go to their experts one by one: not in compiled code, which cannot look at their numbers."""
        few: bool = x is not None and not x.is_meta and self.gate.top is not None and self.gate.top < self.n
        return few and base.kind.linear and not torch.compiler.is_compiling()

    def _dispatched(self, x: Tensor, y: Tensor, inner: Thin, weights: Tensor) -> Tensor:
        x = forms.dropped(x, y, inner.dropout)
        a, b = inner.A.to(y.dtype), forms.factors(inner._replace(inner=None))[1].to(y.dtype)
        a, b = (t.expand(self.n, *t.shape[-2:]) for t in (a, b))
        own = None if inner.inner is None else inner.inner.to(y.dtype).expand(self.n, a.shape[-2])
        return dispatched(x, weights.to(y.dtype) * inner.scale, self.gate.top or self.n, a, b, own)

    def _summed(self, x: Any, y: Tensor, base: Base, weights: Tensor) -> Tensor:
        """Each expert's own change, weighed."""
        many = x if x is None else x.expand(self.n, *x.shape)
        each: Tensor = self.experts(many, y.expand(self.n, *y.shape), stacked_base(base, self.n))
        share = weights.movedim(-1, 0).to(each.dtype)
        return (share.reshape(*share.shape, *(1,) * (each.ndim - share.ndim)) * each).sum(0)
