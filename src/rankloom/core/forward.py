"""What a grafted layer returns: the base output with the change of every active adapter, each seeing the base alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.base import Base
from rankloom.core.fuse import answer
from rankloom.core.kinds import Kind
from rankloom.core.packing import in_segments
from rankloom.core.selection import Selection, Weight
from rankloom.core.site import LAYER
from rankloom.core.slots import Anchor, anchor_of, bring_home, computed_once, run, slot_table
from rankloom.errors import StateError
from rankloom.ops.autocast import autocasts


def forward_of(plain: Callable[..., Any], parameters: tuple[str, ...]) -> Callable[..., Any]:
    """The forward of a generated class around `plain`, that of its base class; `parameters` are its parameter slots."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        anchor: Anchor | None = self.__dict__.get("_rankloom")
        if anchor is None:  # another thread took the last adapter off after this class was looked up
            return plain(self, *args, **kwargs)
        traced = torch.compiler.is_compiling()
        if anchor.kind is not None and len(args) == 1 and not kwargs and not traced and torch.is_grad_enabled():
            selection = anchor.selector.uncompiled()
            if selection.active:
                if anchor.selector.reached is not None:
                    anchor.selector.reached.add(anchor.name)
                fused = answer(self, anchor.memo, args[0], selection)
                if fused is not None:
                    return fused
        if parameters and not traced:
            with computed_once(self):
                y = run(self, plain, args, kwargs)
        else:
            y = run(self, plain, args, kwargs)
        kind = anchor.kind
        if kind is None:
            return y
        selector = anchor.selector
        if selector.reached is not None:
            selector.reached.add(anchor.name)
        selection = selector.current()
        if not selection.active:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        return _changed(self, anchor, kind, x, y, selection)

    return forward


def _changed(layer: nn.Module, anchor: Anchor, kind: Kind, x: Any, y: Tensor, selection: Selection) -> Tensor:
    table = slot_table(layer, LAYER)
    base = Base(kind, layer, selection.context, anchor.selector.notes)
    hooked = "_hf_hook" in layer.__dict__
    out, each = y, selection.active
    stackable = kind.linear and not hooked and base.notes is None and not base.context and _plain(y)
    if selection.segments is not None and stackable:
        _times(layer, y, selection.batch)
        out, each = in_segments(table, x, y, base, selection, anchor.stacks)
    for active in each:
        adapter = table.get(active.name)
        if adapter is None:
            continue
        if hooked:
            bring_home(adapter)
        if active.rows is None:
            out = adapter.add(out, x, y, base, _by_row(layer, y, active.weight))
        else:
            rows = _expand(layer, y, active.rows, selection.batch)
            part = Base(kind, layer, selection.context, anchor.selector.notes, rows)
            changed = adapter.add(out[rows], x[rows], y[rows], part, active.weight)
            out = out.index_copy(0, rows, changed.to(out.dtype))
    return out


def _by_row(layer: nn.Module, y: Tensor, weight: Weight) -> Weight:
    """The weight in the rows (and tokens) of `y`: a number, or a tensor of no, one or two dims."""
    if not isinstance(weight, Tensor) or not weight.ndim:
        return weight
    if weight.shape[0] != y.shape[0]:
        weight = weight.repeat_interleave(_fold(layer, y, weight.shape[0]), dim=0)
    if weight.ndim > 2 or (weight.ndim == 2 and (y.ndim < 3 or weight.shape[1] != y.shape[1])):
        raise StateError(
            f"weights of shape {tuple(weight.shape)}: layer {anchor_of(layer).name!r} gives {tuple(y.shape)}; "
            "a weight has the shape (), (batch,) or (batch, tokens) of this very pass"
        )
    return weight


def _fold(layer: nn.Module, y: Tensor, batch: int) -> int:
    """How many leading entries of `y` belong to one batch row (beams; flattened tokens only where it is certain)."""
    times, left = divmod(y.shape[0], batch)
    if y.ndim > 2 and not left and times > 1 and y.shape[1] == batch:
        raise StateError(
            f"per-row adapters: layer {anchor_of(layer).name!r} sees {tuple(y.shape)} for a selection of {batch} rows: "
            "the rows may be its second dim (a model that computes time first), or these are as many tokens as rows; "
            "select one adapter for all rows, or pad by one token where the model computes rows first"
        )
    if left or y.ndim < 3:
        raise StateError(
            f"per-row adapters: layer {anchor_of(layer).name!r} sees {y.shape[0]} rows, the selection has {batch}; "
            "this layer does not keep batch rows apart (flattened or routed tokens): select one adapter for all rows"
        )
    return times


def _times(layer: nn.Module, y: Tensor, batch: int | None) -> int:
    return 1 if batch is None or batch == y.shape[0] else _fold(layer, y, batch)


def _expand(layer: nn.Module, y: Tensor, rows: Tensor, batch: int | None) -> Tensor:
    rows, times = rows.to(y.device), _times(layer, y, batch)
    return rows if times == 1 else (rows[:, None] * times + torch.arange(times, device=y.device)).flatten()


def _plain(y: Tensor) -> bool:
    """True where nothing traces or recasts what runs now."""
    return not (torch.compiler.is_compiling() or autocasts(y))
