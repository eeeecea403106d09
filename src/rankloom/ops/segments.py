"""Many thin changes in one batch: every row of the batch has its own adapter, or none.

y_t ← y_t + s_i·x_t A_iᵀ B_iᵀ for the tokens t of the rows of adapter i. The batch is sorted once (`segments`), not in
every layer; factors of different ranks lie in one `Stack`, padded by zeros. Two ways through it: all adapters in one
batched product, and run by run; `added` picks one by the shape of the batch. With gradients: `trained`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from rankloom.ops.triton import usable

FEW = 8
"""Tokens of a row up to which rows are gathered for one batched product (decoding); beyond it, run by run."""


@dataclass(frozen=True, slots=True)
class Segments:
    """A batch sorted by adapter: `which` (batch,) adapter of each row, −1 for none; `runs` (adapter, first row, end
    row) in the order of rows; `slots` (adapters, most rows of one) row numbers, the first one again where an adapter
    has fewer; `filled`: flat slots that are no such filling, None where all rows stand in the slots in order.
    """

    which: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]
    slots: Tensor
    filled: Tensor | None
    _known: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return len(self.which)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The slots, flat, and where those of the rows stand among them; moved once to a device."""
        if device not in self._known:
            places = torch.arange(self.slots.numel()) if self.filled is None else self.filled
            self._known[device] = self.slots.flatten().to(device), places.to(device)
        found: tuple[Tensor, Tensor] = self._known[device]
        return found

    def numbers(self, device: torch.device) -> Tensor:
        """(batch,) the adapter of each row, their count for none; moved once to a device."""
        key = ("numbers", device)
        if key not in self._known:
            none = self.slots.shape[0]
            self._known[key] = torch.tensor([none if i < 0 else i for i in self.which], device=device)
        found: Tensor = self._known[key]
        return found

    def blocks(self, tokens: int, tile: int, device: torch.device) -> Tensor:
        """(blocks, 3) int32: up to `tile` neighbouring tokens of an adapter: its number, the first, the end."""
        key = (tokens, tile, device)
        if key not in self._known:
            spans = [(i, start * tokens, stop * tokens) for i, start, stop in self.runs]
            table = [(i, at, stop) for i, start, stop in spans for at in range(start, stop, tile)]
            self._known[key] = torch.tensor(table, dtype=torch.int32, device=device)
        found: Tensor = self._known[key]
        return found

    def only(self, adapters: tuple[int, ...]) -> Segments:
        """The same batch for these adapters alone, numbered anew; sorted once for each set of them."""
        if len(adapters) == self.slots.shape[0]:
            return self
        if adapters not in self._known:
            number = {old: new for new, old in enumerate(adapters)}
            self._known[adapters] = segments([number.get(i, -1) for i in self.which])
        found: Segments = self._known[adapters]
        return found


@dataclass(frozen=True, slots=True)
class Stack:
    """Factors of several adapters in one dtype: `a` (n, r, in), `b` (n, r, out) transposed, r the largest of `ranks`;
    rows beyond an adapter's rank are zero, and so is what they add. `scales` (n, 1, 1), `factors`: the same as numbers.
    """

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]
    scales: Tensor
    factors: tuple[float, ...]


def segments(which: Sequence[int]) -> Segments:
    """Sort a batch by `which` (batch,): the number of each row's adapter, all numbers from 0 in use, −1 for none."""
    runs, at = [], 0
    for adapter, group in groupby(which):
        stop = at + len(list(group))
        if adapter >= 0:
            runs.append((adapter, at, stop))
        at = stop
    rows: list[list[int]] = [[] for _ in range(max(which) + 1)]
    for row, adapter in enumerate(which):
        if adapter >= 0:
            rows[adapter].append(row)
    most = max(map(len, rows))
    slots = torch.tensor([[*own, *[own[0]] * (most - len(own))] for own in rows])
    in_order = slots.flatten().tolist() == list(range(len(which)))
    filled = torch.tensor([i * most + j for i, own in enumerate(rows) for j in range(len(own))])
    return Segments(tuple(which), tuple(runs), slots, None if in_order else filled)


def stack(pairs: Sequence[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Stack:
    """The factors A (r, in), B (out, r) and scales of several adapters as one `Stack`."""
    ranks = tuple(a.shape[0] for a, _, _ in pairs)
    first, last, _ = pairs[0]
    a = first.new_zeros(len(pairs), max(ranks), first.shape[1], dtype=dtype)
    b = first.new_zeros(len(pairs), max(ranks), last.shape[0], dtype=dtype)
    for i, (down, up, _) in enumerate(pairs):
        a[i, : ranks[i]] = down
        b[i, : ranks[i]] = up.mT
    factors = tuple(scale for *_, scale in pairs)
    return Stack(a, b, ranks, a.new_tensor(factors)[:, None, None], factors)


def added(y: Tensor, x: Tensor, found: Segments, held: Stack) -> Tensor:
    """`y` (rows, …, out) with the changes for `x` (rows, …, in) written into it; rows without adapter are untouched.

    The batch of `found` may stand for several rows of `y` each (beams): batch row i is rows i·m to (i+1)·m.
    """
    if usable(y, y.dtype):
        from rankloom.ops.triton import segments as kernels

        return kernels.added(y, x, found, held, FEW)
    tokens = x.numel() // x.shape[-1] // found.batch
    flat = y.reshape(-1, y.shape[-1])
    if found.filled is None:
        _in_place(flat, x.reshape(len(held.ranks), -1, x.shape[-1]), held)
    elif tokens <= FEW and found.slots.numel() <= 2 * found.batch:
        _gathered(flat, x, found, held, tokens)
    else:
        _by_run(flat, x.reshape(-1, x.shape[-1]), found, held, tokens)
    return flat.reshape(y.shape)


def _in_place(y: Tensor, x: Tensor, held: Stack) -> None:
    """All rows stand in the slots in order: one batched product straight into the output."""
    h = torch.bmm(x, held.a.mT).mul_(held.scales)
    y.view(len(held.ranks), -1, y.shape[-1]).baddbmm_(h, held.b)


def _gathered(y: Tensor, x: Tensor, found: Segments, held: Stack, tokens: int) -> None:
    """The rows of each adapter side by side, one batched product, and back."""
    rows, filled = found.on(x.device)
    side = x.reshape(found.batch, -1).index_select(0, rows).reshape(len(held.ranks), -1, x.shape[-1])
    change = torch.bmm(torch.bmm(side, held.a.mT).mul_(held.scales), held.b).reshape(rows.shape[0], -1)
    y.view(found.batch, -1).index_add_(0, rows[filled], change[filled])


def _by_run(y: Tensor, x: Tensor, found: Segments, held: Stack, tokens: int) -> None:
    """Neighbouring rows of one adapter at a time, straight into the output."""
    for i, start, stop in found.runs:
        r, part = held.ranks[i], slice(start * tokens, stop * tokens)
        y[part].addmm_(x[part] @ held.a[i, :r].mT, held.b[i, :r], alpha=held.factors[i])


def trained(y: Tensor, x: Tensor, found: Segments, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """A new tensor: `y` with the changes added, differentiable by y, x, and every A (r, in) and B (out, r) in `pairs`.

    An adapter's gradients come from its own rows alone.
    """
    factors = [t for a, b, _ in pairs for t in (a, b)]
    out: Tensor = _Trained.apply(found, tuple(s for *_, s in pairs), y, x, *factors)  # type: ignore[no-untyped-call]
    return out


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: Segments, scales: tuple[float, ...], y: Tensor, x: Tensor, *factors: Tensor) -> Tensor:
        flat, out = x.reshape(-1, x.shape[-1]), y.clone(memory_format=torch.contiguous_format)
        tokens = flat.shape[0] // found.batch
        rows, thin = out.view(-1, y.shape[-1]), []
        for i, start, stop in found.runs:
            a, b = (t.to(y.dtype) for t in factors[2 * i : 2 * i + 2])
            part = slice(start * tokens, stop * tokens)
            thin.append(flat[part] @ a.mT)
            rows[part].addmm_(thin[-1], b.mT, alpha=scales[i])
        ctx.found, ctx.scales, ctx.tokens = found, scales, tokens
        ctx.save_for_backward(x, *factors, *thin)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        factors, thin = rest[: 2 * len(ctx.scales)], rest[2 * len(ctx.scales) :]
        flat, rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        needs = ctx.needs_input_grad[3:]
        dx = torch.zeros_like(flat) if needs[0] else None
        grads: list[Tensor | None] = [torch.zeros_like(t) if n else None for t, n in zip(factors, needs[1:])]
        for h, (i, start, stop) in zip(thin, ctx.found.runs):
            a, b = (t.to(dy.dtype) for t in factors[2 * i : 2 * i + 2])
            part, scale = slice(start * ctx.tokens, stop * ctx.tokens), ctx.scales[i]
            dh = rows[part] @ b
            if (db := grads[2 * i + 1]) is not None:
                db += (rows[part].mT @ h).mul_(scale)
            if (da := grads[2 * i]) is not None:
                da += (dh.mT @ flat[part]).mul_(scale)
            if dx is not None:
                dx[part] = (dh @ a).mul_(scale)
        return None, None, dy, None if dx is None else dx.reshape(x.shape), *grads
