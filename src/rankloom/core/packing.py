"""Mixed batches: rows with adapters of their own, all thin changes of a layer in one pass over its output.

Without gradients the factors lie side by side, cast and scaled, in a `Stack` that is made once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankloom.core import thin as forms
from rankloom.core.adapter import Adapter, fixed_thin
from rankloom.core.base import Base
from rankloom.core.selection import Active, Selection
from rankloom.ops.segments import Segments, Stack, added, stack, trained


class Change(NamedTuple):
    """Δy = s·B A x + column∘(W x) + shift: a thin change that depends on no token and drops nothing."""

    A: Tensor
    B: Tensor
    scale: float
    column: Tensor | None
    shift: Tensor | None


class Packed(NamedTuple):
    """Factors of several changes, and their columns and shifts (n + 1, out), the last ones zero."""

    factors: Stack
    columns: Tensor | None
    shifts: Tensor | None


class Stacked:
    """The changes of some adapters, by their place among them, and what was put side by side of them, by dtype.

    It `holds` as long as no adapter, none of its tensors or settings, and under a magnitude not the base, is another,
    and none was written to. A write past autograd's version counter (through `.data`) is not seen: write to the
    parameter itself, under `torch.no_grad()`.
    """

    def __init__(self, each: Sequence[Adapter | None], base: Base) -> None:
        self.key = tuple(each)
        self.changes = changes_of(each, base)
        self._packed: dict[torch.dtype, Packed] = {}
        modules = [m for adapter in each if adapter is not None for m in _modules(adapter)]
        tables = [table for m in modules for table in (m._parameters, m._buffers)]
        found = [(table, key, t) for table in tables for key, t in table.items() if t is not None]
        if any(change.column is not None for change in self.changes.values()):
            found.append((base.layer._parameters, "weight", base.kind.tensor(base.layer)))
        self._tensors = [(table, key, t, t._version, t.data_ptr()) for table, key, t in found]
        self._settings = [(m, m.settings) for m in modules if isinstance(m, Adapter)]

    def holds(self, each: Sequence[Adapter | None]) -> bool:
        """Whether these are the adapters, as they were."""
        if self.key != tuple(each):
            return False
        for table, key, tensor, version, at in self._tensors:
            if table.get(key) is not tensor or tensor._version != version or tensor.data_ptr() != at:
                return False
        return all(adapter.settings == count for adapter, count in self._settings)

    def packed(self, dtype: torch.dtype) -> Packed:
        """The changes in `dtype`."""
        found = self._packed.get(dtype)
        if found is None:
            rows = stack([(c.A, c.B, c.scale) for c in self.changes.values()], dtype)
            found = Packed(rows, *_tables(list(self.changes.values()), dtype))
            self._packed = {dtype: found}
        return found


class Stacks:
    """What a layer's last mixed batch without gradients put side by side.

    `of` hands out one whole object: threads that mix other adapters at the same layer never see each other's.
    """

    def __init__(self) -> None:
        self._last: Stacked | None = None

    def __reduce__(self) -> Any:
        return Stacks, ()

    def of(self, each: Sequence[Adapter | None], base: Base) -> Stacked:
        """The stack of these adapters."""
        last = self._last
        if last is None or not last.holds(each):
            last = self._last = Stacked(each, base)
        return last


def in_segments(
    table: Mapping[str, Adapter], x: Tensor, y: Tensor, base: Base, selection: Selection, stacks: Stacks
) -> tuple[Tensor, tuple[Active, ...]]:
    """The output with the thin changes of all rows, and the selection that must still be applied one by one.

    Without gradients `y`, fresh from its layer, is written to; else the sum is a new tensor, differentiable by all.
    """
    assert selection.segments is not None
    each = [table.get(v.name) for v in selection.active]
    made = None if torch.is_grad_enabled() else stacks.of(each, base)
    changes = changes_of(each, base) if made is None else made.changes
    if not changes:
        return y, selection.active
    rest = tuple(v for i, v in enumerate(selection.active) if i not in changes)
    found, x = selection.segments.only(tuple(changes)), x.to(y.dtype)
    if made is None:
        out = _moved(y, found, base, *_tables(list(changes.values()), y.dtype))
        return trained(out, x, found, [(c.A, c.B, c.scale) for c in changes.values()]), rest
    packed = made.packed(y.dtype)
    return added(_moved(y, found, base, packed.columns, packed.shifts), x, found, packed.factors), rest


def changes_of(each: Sequence[Adapter | None], base: Base) -> dict[int, Change]:
    """Those of the adapters that are nothing more than a `Change`, by their place in `each`."""
    found = {i: _change(adapter, base) for i, adapter in enumerate(each) if adapter is not None}
    return {i: change for i, change in found.items() if change is not None}


def _change(adapter: Adapter, base: Base) -> Change | None:
    thin = fixed_thin(adapter, base)
    if thin is None or thin.dropout or thin.by_token:
        return None
    thin, column = forms.folded(thin), None
    if thin.magnitude is not None:
        own = forms.gains(thin, base)
        thin, column = forms.ungained(thin, own), own - 1
    return Change(thin.A, thin.B, thin.scale, column, thin.bias)


def _modules(adapter: Adapter) -> Iterator[nn.Module]:
    """All modules whose tensors an adapter may read: its own and those that it borrows from."""
    for module in adapter.modules():
        yield module
        if isinstance(module, Adapter):
            for shared, _ in module._borrowed.values():
                yield from shared.modules()


def _tables(changes: Sequence[Change], dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Columns and shifts of changes, (n + 1, out) with a row of zeros at the end; None where no change has any."""
    zero, made = changes[0].B.new_zeros(changes[0].B.shape[0], dtype=dtype), list[Tensor | None]()
    for each in ([c.column for c in changes], [c.shift for c in changes]):
        rows = [zero if v is None else v.to(dtype) for v in (*each, None)]
        made.append(None if all(v is None for v in each) else torch.stack(rows))
    return made[0], made[1]


def _moved(y: Tensor, found: Segments, base: Base, columns: Tensor | None, shifts: Tensor | None) -> Tensor:
    """`y` with columns∘(W x) and shifts of each row's adapter; in place without gradients."""
    if columns is None and shifts is None:
        return y
    which = found.numbers(y.device)
    rows = y.reshape(found.batch, -1, y.shape[-1])
    if columns is not None:
        moved, own = columns[which][:, None], base.unbiased(rows)
        rows = torch.addcmul(rows, own, moved) if torch.is_grad_enabled() else rows.addcmul_(own, moved)
    if shifts is not None:
        rows = rows + shifts[which][:, None]
    return rows.reshape(y.shape)
