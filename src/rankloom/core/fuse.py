"""The fused path: one autograd function for the layers that read the same input, where their changes are thin.

Which layers read the same input is seen while they run: sites that are called one after the other with the very same
tensor are a group from the next pass on. The first of a group computes the outputs of all; the others take theirs from
where it parked them, when they are called with that tensor in the same thread. A group that misses one dissolves. Where
a site cannot be fused (`core.fusable`) it takes the plain path, and `Memo.plain` says why.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.fusable import Seen, part_of, seen
from rankloom.core.memo import Memo
from rankloom.core.selection import Selection
from rankloom.ops.fused import Layer, fused
from rankloom.ops.rebuild import origin


def memo_of(layer: nn.Module) -> Memo:
    """What a grafted layer has learnt."""
    memo: Memo = layer.__dict__["_rankloom"].memo
    return memo


@dataclass
class _Reader:
    """The sites of this thread that were called in a row with one tensor, and the outputs that wait for the next."""

    seen: Callable[[], Tensor | None] = lambda: None
    version: int = 0
    selection: Selection | None = None
    row: list[weakref.ref[nn.Module]] = field(default_factory=list)
    parked: dict[int, Tensor] = field(default_factory=dict)
    held: Tensor | None = None

    def reads(self, x: Tensor, selection: Selection) -> bool:
        return self.seen() is x and self.version == x._version and self.selection is selection


class _Here(threading.local):
    def __init__(self) -> None:
        self.reader = _Reader()


_here = _Here()


def answer(layer: nn.Module, memo: Memo, x: Any, selection: Selection) -> Tensor | None:
    """The layer's output with the changes of its active adapters, fused; None where it has to take the plain path."""
    reader, given = _here.reader, seen(x, selection)
    if reader.parked and reader.reads(x, selection):
        waiting = reader.parked.pop(id(layer), None)
        reader.held = reader.held if reader.parked else None
        if waiting is not None and waiting.dtype == given.dtype:
            memo.plain = ""
            return waiting
    part = part_of(layer, given)
    if isinstance(part, str):
        memo.plain = part
        return None
    memo.plain = ""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return _run(given, [layer], [part])[0]  # a recomputation has to keep exactly what the first pass kept
    layers, parts = _members(layer, memo, given, part)
    outputs = _run(given, layers, parts)
    if len(layers) > 1:
        reader = _here.reader
        reader.held = x
        reader.parked = {id(member): y for member, y in zip(layers[1:], outputs[1:])}
    return outputs[0]


def _members(layer: nn.Module, memo: Memo, given: Seen, part: Layer) -> tuple[list[nn.Module], list[Layer]]:
    """The layer with those of its group that can be fused now; notes the call where there is no group yet."""
    reader = _here.reader
    if not reader.reads(given.x, given.selection):
        _close(reader)
        reader = _here.reader = _Reader(weakref.ref(given.x), given.x._version, given.selection)
    reader.row.append(weakref.ref(layer))
    layers, parts = [layer], [part]
    if memo.fellows and memo.fellows[0] is layer:
        for fellow in memo.fellows[1:]:
            other = part_of(fellow, given)
            if not isinstance(other, str):
                layers.append(fellow)
                parts.append(other)
    return layers, parts


def _close(reader: _Reader) -> None:
    """The row is over: what it shows of groups."""
    row = [layer for ref in reader.row if (layer := ref()) is not None and "_rankloom" in layer.__dict__]
    memos = [memo_of(layer) for layer in row]
    if reader.parked:
        for memo in memos:
            _dissolve(memo)
    elif len(set(row)) == len(reader.row) > 1 and not any(memo.settled or memo.fellows for memo in memos):
        for memo in memos:
            memo.fellows = tuple(row)


def _dissolve(memo: Memo) -> None:
    for fellow in memo.fellows:
        if "_rankloom" in fellow.__dict__:
            other = memo_of(fellow)
            other.settled, other.fellows = True, ()


def known_groups(model: nn.Module) -> dict[str, Any]:
    """What the layers of a model have learnt of groups, as JSON values: inside a group sums round in another order."""
    _close(_here.reader)
    _here.reader = _Reader()
    names = {id(layer): name for name, layer in _grafted(model).items()}
    memos = {name: memo_of(layer) for name, layer in _grafted(model).items()}
    firsts = [m.fellows for name, m in memos.items() if m.fellows and names.get(id(m.fellows[0])) == name]
    together = [[names[id(f)] for f in fellows] for fellows in firsts if all(id(f) in names for f in fellows)]
    return {"together": together, "settled": [name for name, memo in memos.items() if memo.settled]}


def recall_groups(model: nn.Module, known: Mapping[str, Any]) -> None:
    """Take back what `known_groups` gave, so that a resumed run rounds as the one that it goes on with."""
    layers = _grafted(model)
    for names in known["together"]:
        fellows = tuple(layers[name] for name in names)
        for fellow in fellows:
            memo_of(fellow).fellows = fellows
    for name in known["settled"]:
        memo_of(layers[name]).settled = True


def _grafted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if "_rankloom" in layer.__dict__}


def _run(given: Seen, layers: list[nn.Module], parts: list[Layer]) -> tuple[Tensor, ...]:
    shortcut = len(layers) == 1 and not (layers[0]._forward_hooks or layers[0]._forward_pre_hooks)
    return fused(given.x, parts, origin(given.x, shortcut), given.dtype)
