"""Stacks: n experts of one method at one site are one adapter whose tensors have n as their first dim.

Where they have a thin form, n experts with their weights are one thin form too (`mixed`). Else each expert answers by
itself, through a kind that carries the first dim along (`Stacked`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.base import Base
from rankloom.core.kinds import Kind
from rankloom.core.site import Site
from rankloom.core.thin import Thin, factors


class Stacked(Kind):
    """A kind whose inputs, outputs and matrices have n as their first dim; one without it is every expert's."""

    def __init__(self, kind: Kind, n: int) -> None:
        self.kind, self.n = kind, n
        self.name, self.linear = kind.name, kind.linear

    def tensor(self, layer: nn.Module) -> Tensor:
        return self.kind.tensor(layer)

    def parameter(self) -> str:
        return self.kind.parameter()

    def weight(self, layer: nn.Module) -> Tensor:
        return self.kind.weight(layer)

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return (self.n, *self.kind.shape(layer))

    def matrix(self, layer: nn.Module) -> Tensor:
        return self.kind.matrix(layer)

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return self._each(lambda m: self.kind.to_weight(layer, m), (matrix, matrix.ndim > 2))

    def bias(self, layer: nn.Module) -> Tensor | None:
        return self.kind.bias(layer)

    def groups(self, layer: nn.Module) -> int:
        return self.kind.groups(layer)

    def down(self, layer: nn.Module, x: Any, a: Tensor) -> Tensor:
        return self._each(lambda x, a: self.kind.down(layer, x, a), (x, True), (a, a.ndim > 2))

    def up(self, layer: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        return self._each(lambda h, b: self.kind.up(layer, h, b), (h, True), (b, b.ndim > 2))

    def scale(self, y: Tensor, v: Tensor) -> Tensor:
        return self._each(self.kind.scale, (y, True), (v, v.ndim > 1))

    def shift(self, y: Tensor, v: Tensor) -> Tensor:
        return self._each(lambda y, v: self.kind.shift(y, v).expand_as(y), (y, True), (v, v.ndim > 1))

    def apply(self, layer: nn.Module, x: Any, matrix: Tensor) -> Tensor:
        return self._each(lambda x, m: self.kind.apply(layer, x, m), (x, True), (matrix, matrix.ndim > 2))

    def _each(self, call: Callable[..., Tensor], *given: tuple[Tensor, bool]) -> Tensor:
        """`call` for every expert; of a stacked tensor the expert's own."""
        parts = [[t[i] if stacked else t for t, stacked in given] for i in range(self.n)]
        return torch.stack([call(*part) for part in parts])


def stacked(site: Site, n: int) -> Site:
    """The site of n experts of `site`: their tensors get n as first dim."""
    part = site.part(site.name, (n, *site.shape))
    return part if site.bare else replace(part, kind=Stacked(site.kind, n))


def stacked_base(base: Base, n: int) -> Base:
    """The base as n experts see it; a bare parameter's kind carries leading dims by itself."""
    if base.kind.name == "parameter":
        return base
    return Base(Stacked(base.kind, n), base.layer, base.context, base.notes, base.rows)


def mixed(thin: Thin, weights: Tensor) -> Thin:
    """Σ_i w_i·(expert i) as one thin form of rank n·r: weights (n,), or (…, n) by row or token, and a stacked thin form
    without magnitude. A bias takes constant weights.
    """
    n = weights.shape[-1]
    a, b = thin.A, factors(thin._replace(inner=None))[1]
    dims = max(a.ndim, b.ndim)
    a, b = (t if t.ndim == dims else t.expand(n, *t.shape) for t in (a, b))
    own = a.new_ones(()).expand(a.shape[:-1]) if thin.inner is None else thin.inner.expand(a.shape[:-1])
    if weights.ndim == 1:
        inner = (weights.reshape(n, *(1,) * (own.ndim - 1)) * own).movedim(0, -2).flatten(-2)
    else:
        inner = (weights[..., None] * own).flatten(-2)
    bias = None if thin.bias is None else torch.tensordot(weights.to(thin.bias), thin.bias, 1)
    a, b = a.movedim(0, -3).flatten(-3, -2), b.movedim(0, -2).flatten(-2)
    return Thin(a, b, thin.scale, inner, bias=bias, dropout=thin.dropout)


def mixes(thin: Thin | None) -> bool:
    """Whether `mixed` takes it: a stacked thin form without magnitude, whose inner weights look at no token."""
    if thin is None or thin.magnitude is not None:
        return False
    return thin.inner is None or thin.inner.ndim < max(thin.A.ndim, thin.B.ndim)
