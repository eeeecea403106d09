"""From the words of `Bank.use` to a selection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.selection import Active, Selection, Weight
from rankloom.errors import SettingsError
from rankloom.ops.segments import segments

TIME_FIRST = frozenset({"xlnet", "longformer", "led", "fsmt", "transfo-xl"})
"""Model types of transformers whose layers see (time, batch, …)."""
Rows = Sequence[str | None] | Tensor


def choose(
    known: Sequence[str],
    check: Callable[[str], None],
    names: Sequence[str],
    weights: Mapping[str, Weight],
    rows: Rows | None,
    context: Mapping[str, Any],
) -> Selection:
    """The selection of `names`, of `weights` by name, or of `rows`; `check` refuses a name that is not `known`."""
    if rows is not None:
        if weights:
            raise SettingsError("rows and weights together: give the weights as (batch,) tensors instead of rows")
        return (
            _by_index(tuple(names) or tuple(known), check, rows, context)
            if isinstance(rows, Tensor)
            else (_by_name(names, check, rows, context))
        )
    chosen: dict[str, Weight] = {**dict.fromkeys(names, 1.0), **weights}
    for name, weight in chosen.items():
        check(name)
        if isinstance(weight, bool) or not isinstance(weight, (int, float, Tensor)):
            raise SettingsError(f"{name}={weight!r}: a weight is a number or a tensor, as in use({name}=0.5)")
    return Selection(tuple(Active(name, weight) for name, weight in chosen.items()), context=context)


def time_first(model: nn.Module, paths: Iterable[str]) -> str:
    """What of a model computes with time before the batch rows, around the layers of these paths; "" for nothing."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in TIME_FIRST:
        return f"a {kind} model"
    around = {path[:end] for path in paths for end in (0, *(i for i, letter in enumerate(path) if letter == "."))}
    beside = {path.rpartition(".")[0] for path in paths}
    for name in sorted(around):
        owner = model.get_submodule(name)
        for key, module in {"": owner, **(owner._modules if name in beside else {})}.items():
            if getattr(module, "batch_first", True) is False:
                return f"{'.'.join(filter(None, (name, key)))!r} (batch_first=False)"
    return ""


def _by_index(
    order: Sequence[str], check: Callable[[str], None], rows: Tensor, context: Mapping[str, Any]
) -> Selection:
    for name in order:
        check(name)
    return Selection(tuple(Active(name, (rows == i).float()) for i, name in enumerate(order)), context=context)


def _by_name(
    names: Sequence[str], check: Callable[[str], None], rows: Sequence[str | None], context: Mapping[str, Any]
) -> Selection:
    if names:
        raise SettingsError("rows as a list already names the adapters")
    wanted = dict.fromkeys(name for name in rows if name is not None)
    for name in wanted:
        check(name)
    if not wanted:
        return Selection(batch=len(rows), context=context)
    number = {name: i for i, name in enumerate(wanted)}
    found = segments([-1 if row is None else number[row] for row in rows])
    of = {n: torch.tensor([i for i, w in enumerate(found.which) if w == number[n]]) for n in wanted}
    each = tuple(Active(name, 1.0, own) for name, own in of.items())
    return Selection(each, batch=len(rows), context=context, segments=found)
