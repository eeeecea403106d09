"""The fused path: one autograd function for the layers that read the same input, where their changes are thin.

Which layers read the same input is seen while they run: sites that are called one after the other with the very same
tensor are a group from the next pass on. The first of a group computes the outputs of all; the others take theirs from
where it parked them, when they are called with that tensor in the same thread. A group that misses one dissolves. Where
a site cannot be fused it takes the plain path, and `Memo.plain` says why.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rankloom.core.adapter import Adapter, fixed_thin
from rankloom.core.base import Base
from rankloom.core.kinds import product
from rankloom.core.memo import Memo
from rankloom.core.selection import Active, Selection
from rankloom.ops.autocast import autocasts
from rankloom.ops.fused import Layer, fused
from rankloom.ops.rebuild import origin
from rankloom.store.base import Packed

Chooser = Callable[[nn.Module, Selection], tuple[Active, Adapter] | str]
"""The one active adapter of a layer; or why there is no such."""


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


def answer(layer: nn.Module, x: Any, selection: Selection, chooser: Chooser) -> Tensor | None:
    """The layer's output with its one adapter's change, fused; None where it has to take the plain path."""
    memo, reader = memo_of(layer), _here.reader
    if reader.parked and isinstance(x, Tensor) and reader.reads(x, selection):
        waiting = reader.parked.pop(id(layer), None)
        reader.held = reader.held if reader.parked else None
        if waiting is not None and waiting.dtype == _product_dtype(x):
            memo.plain = ""
            return waiting
    why = _unfit_input(x)
    seen = _Seen(x, why, not why and _autocast(x), selection, chooser)
    part = _part(layer, seen)
    memo.plain = part if isinstance(part, str) else ""
    if isinstance(part, str):
        return None
    if _watched():
        return _run(x, [layer], [part])[0]
    members = _members(layer, seen, part)
    outputs = _run(x, [member for member, _ in members], [p for _, p in members])
    if len(members) > 1:
        reader = _here.reader
        reader.held = x
        reader.parked = {id(member): y for (member, _), y in zip(members[1:], outputs[1:])}
    return outputs[0]


class _Seen(NamedTuple):
    """What layers are called with, the same for all of a group: the input, why it cannot be fused ("": it can), whether
    autocast is on for it, who is active.
    """

    x: Any
    why: str
    casts: bool
    selection: Selection
    chooser: Chooser


def _members(layer: nn.Module, seen: _Seen, part: Layer) -> list[tuple[nn.Module, Layer]]:
    """The layer with those of its group that can be fused now; notes the call where there is no group yet."""
    reader, memo = _here.reader, memo_of(layer)
    if not reader.reads(seen.x, seen.selection):
        _close(reader)
        reader = _here.reader = _Reader(weakref.ref(seen.x), seen.x._version, seen.selection)
    reader.row.append(weakref.ref(layer))
    if not memo.fellows or memo.fellows[0] is not layer:
        return [(layer, part)]
    parts = [(fellow, _part(fellow, seen)) for fellow in memo.fellows[1:]]
    return [(layer, part), *((fellow, p) for fellow, p in parts if not isinstance(p, str))]


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


def _run(x: Tensor, layers: list[nn.Module], parts: list[Layer]) -> tuple[Tensor, ...]:
    listened = any(m._forward_hooks or m._forward_pre_hooks for m in layers)
    return fused(x, parts, origin(x, shortcut=len(parts) == 1 and not listened), _product_dtype(x))


def _part(layer: nn.Module, seen: _Seen) -> Layer | str:
    """The layer as the fused function takes it, or why it cannot."""
    x, unfit, casts, selection, chooser = seen
    anchor = layer.__dict__.get("_rankloom")
    if anchor is None or anchor.kind is None:
        return "no adapter"
    why = _unfit_layer(layer) or unfit or ("" if anchor.selector.fused else "switched off")
    found = why or chooser(layer, selection)
    if isinstance(found, str):
        return found
    active, adapter = found
    if active.rows is not None or not isinstance(active.weight, (int, float)):
        return "weighted by rows or by a tensor"
    weight = anchor.kind.tensor(layer)
    if weight.dtype != x.dtype and not casts:
        return f"an input of {x.dtype} on weights of {weight.dtype}"
    if weight.device != x.device or x.shape[-1] != anchor.kind.shape(layer)[-1]:
        return "an input that does not fit"
    base = Base(anchor.kind, layer, selection.context, anchor.selector.notes)
    thin = fixed_thin(adapter, base)
    if thin is None or thin.inner is not None or thin.outer is not None or thin.bias is not None:
        return f"{type(adapter).__name__} is not, or not now, a pair of thin factors"
    magnitude = thin.magnitude
    if not (thin.A.requires_grad or thin.B.requires_grad or (magnitude is not None and magnitude.requires_grad)):
        return "nothing trains"
    if magnitude is not None and (active.weight != 1 or thin.dropout):
        return "a magnitude with a weight or with dropout"
    square = None if magnitude is None else square_norms(base)
    bias = layer._parameters.get("bias")
    scale = thin.scale * active.weight
    return Layer(weight, anchor.kind.read, bias, thin.A, thin.B, scale, thin.dropout, magnitude, square)


_plain = cache(product)


def _unfit_layer(layer: Any) -> str:
    if _plain(layer.rankloom_original) is None:
        return f"the forward of {layer.rankloom_original.__name__} is more than a linear product"
    if layer.rankloom_parameters:
        return f"{layer.rankloom_parameters[0]} is adapted too"
    if "_hf_hook" in layer.__dict__:
        return "an offload hook moves its weights"
    for key in ("weight", "bias"):
        tensor = layer._parameters.get(key)
        if tensor is not None and tensor.requires_grad:
            return f"its {key} is trained"
        if tensor is not None and (tensor.is_inference() or not (_is_plain(tensor) or isinstance(tensor, Packed))):
            return f"its {key} is a {type(tensor).__name__} that autograd does not track plainly"
    return ""


def _unfit_input(x: Any) -> str:
    if not (isinstance(x, Tensor) and _is_plain(x) and x.is_floating_point() and x.ndim > 1 and x.numel()):
        return "an input that is no plain tensor of floats, rows by columns"
    if (
        torch.is_inference(x)
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return "a transform of the forward pass"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return ""


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the layer's product: autocast's, where that is on."""
    return torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype


def _autocast(x: Tensor) -> bool:
    return autocasts(x) and x.dtype != torch.float64


def _watched() -> bool:
    """Whether saved-tensor hooks are on: a recomputation has to keep exactly what the first pass kept."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def square_norms(base: Base) -> Tensor:
    """‖W‖² by rows (out,), in float32 at least: computed once for each frozen weight and version of it."""
    held = _held(base.kind.tensor(base.layer))
    memo = memo_of(base.layer)
    key = (held._version, 0 if isinstance(held, FakeTensor) else held.data_ptr(), held.device)
    if memo.square is not None and memo.square[0]() is held and memo.square[1] == key:
        return memo.square[2]
    matrix = base.matrix()
    square = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).square().sum(-1)
    memo.square = (weakref.ref(held), key, square)
    return square


def _held(weight: Tensor) -> Tensor:
    """The first tensor inside a wrapper, else the weight: torch moves no wrapper that somebody refers to weakly."""
    while is_traceable_wrapper_subclass(weight):
        weight = getattr(weight, weight.__tensor_flatten__()[0][0])
    return weight
