"""Mixed batches: rows with adapters of their own, all thin changes of a layer in one pass over its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankloom.core.adapter import Adapter, Thin, pair_of
from rankloom.core.kinds import Base
from rankloom.core.switch import Voice, Voices
from rankloom.ops.segments import Stack, added, stack, trained


class Stacks:
    """The factors that a layer's last mixed batch used, side by side in one tensor each.

    Made again when a factor is another tensor or was written to, or a scale changed. A write past autograd's version
    counter (through `.data`) is not seen: write to the parameter itself, under `torch.no_grad()`.
    """

    def __init__(self) -> None:
        self._held: Stack | None = None
        self._state: list[Any] = []
        self._factors: list[Thin] = []

    def __reduce__(self) -> Any:
        return Stacks, ()

    def of(self, factors: Sequence[Thin], dtype: torch.dtype) -> Stack:
        """The stack of `factors` in `dtype`."""
        state: list[Any] = [dtype]
        for thin in factors:
            a, b = thin.A, thin.B
            state += (id(a), a._version, a.data_ptr(), id(b), b._version, b.data_ptr(), thin.scale)
        if self._held is None or state != self._state:
            self._held = stack([(thin.A, thin.B, thin.scale) for thin in factors], dtype)
            self._state, self._factors = state, list(factors)  # held, so that no id is given to another tensor
        return self._held


def in_segments(
    table: Mapping[str, Adapter], x: Tensor, y: Tensor, base: Base, voices: Voices, stacks: Stacks
) -> tuple[Tensor, tuple[Voice, ...]]:
    """The output with the thin changes of all rows, and the voices that must still speak one by one.

    Without gradients `y`, fresh from its layer, is written to; else the sum is a new tensor, differentiable by all.
    """
    assert voices.segments is not None
    heard = {i: adapter for i, v in enumerate(voices.speakers) if (adapter := table.get(v.name)) is not None}
    factors = {i: thin for i, adapter in heard.items() if (thin := pair_of(adapter, base)) is not None}
    if not factors:
        return y, voices.speakers
    rest = tuple(v for i, v in enumerate(voices.speakers) if i not in factors)
    found, pairs, x = voices.segments.only(tuple(factors)), list(factors.values()), x.to(y.dtype)
    if torch.is_grad_enabled():
        return trained(y, x, found, [(t.A, t.B, t.scale) for t in pairs]), rest
    return added(y, x, found, stacks.of(pairs, y.dtype)), rest
