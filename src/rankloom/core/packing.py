"""Mixed batches: rows with adapters of their own, all thin changes of a layer in one pass over its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, TypeGuard

import torch
from torch import Tensor

from rankloom.core.adapter import Adapter, fixed_thin
from rankloom.core.base import Base
from rankloom.core.selection import Active, Selection
from rankloom.core.thin import Thin
from rankloom.ops.segments import Stack, added, stack, trained


class Stacks:
    """The thin changes that a layer's last mixed batch used, and their factors side by side in one tensor each.

    Made again when an adapter, one of its tensors or numbers is another, or a tensor was written to. A write past
    autograd's version counter (through `.data`) is not seen: write to the parameter itself, under `torch.no_grad()`.
    """

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()
        self._tensors: Sequence[Tensor] = ()
        self._factors: dict[int, Thin] = {}
        self._held: dict[torch.dtype, Stack] = {}

    def __reduce__(self) -> Any:
        return Stacks, ()

    def factors(self, each: Sequence[Adapter | None], base: Base) -> Mapping[int, Thin]:
        """The changes that are nothing but two factors, by their place in `each`; afresh for every pass with gradients,
        as factors may be computed from what is trained.
        """
        if torch.is_grad_enabled():
            return _factors(each, base)
        adapters = [a for a in each if a is not None]
        tensors = [p for a in adapters for p in a._parameters.values() if p is not None]
        numbers = [(a.training, a.hooked, a.dropout, a.__dict__.get("scaling"), len(a.__dict__)) for a in adapters]
        state = (each, numbers, [t._version for t in tensors], [t.data_ptr() for t in tensors])
        if state != self._state or len(tensors) != len(self._tensors) or not all(map(is_, tensors, self._tensors)):
            self._factors = _factors(each, base)
            self._state, self._tensors, self._held = state, tensors, {}
        return self._factors

    def stacked(self, dtype: torch.dtype) -> Stack:
        """The factors last asked for, in `dtype`."""
        if dtype not in self._held:
            self._held = {dtype: stack([(t.A, t.B, t.scale) for t in self._factors.values()], dtype)}
        return self._held[dtype]


def in_segments(
    table: Mapping[str, Adapter], x: Tensor, y: Tensor, base: Base, selection: Selection, stacks: Stacks
) -> tuple[Tensor, tuple[Active, ...]]:
    """The output with the thin changes of all rows, and the selection that must still be applied one by one.

    Without gradients `y`, fresh from its layer, is written to; else the sum is a new tensor, differentiable by all.
    """
    assert selection.segments is not None
    factors = stacks.factors([table.get(v.name) for v in selection.active], base)
    if not factors:
        return y, selection.active
    rest = tuple(v for i, v in enumerate(selection.active) if i not in factors)
    found, x = selection.segments.only(tuple(factors)), x.to(y.dtype)
    if torch.is_grad_enabled():
        return trained(y, x, found, [(t.A, t.B, t.scale) for t in factors.values()]), rest
    return added(y, x, found, stacks.stacked(y.dtype)), rest


def _factors(each: Sequence[Adapter | None], base: Base) -> dict[int, Thin]:
    found = {i: _own(adapter, base) for i, adapter in enumerate(each) if adapter is not None}
    return {i: thin for i, thin in found.items() if _plain(thin)}


def _own(adapter: Adapter, base: Base) -> Thin | None:
    """The thin form of an adapter that has all its tensors itself and needs no input."""
    return None if adapter._modules or adapter._borrowed else fixed_thin(adapter, base)


def _plain(thin: Thin | None) -> TypeGuard[Thin]:
    """Whether a change is nothing but two factors."""
    return thin is not None and thin[3:] == (None, None, None, None, 0.0)
