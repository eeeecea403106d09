"""A grafted layer as the fused function takes it (`ops.fused.Layer`), or why it cannot be fused, in plain words."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rankloom.core import thin as forms
from rankloom.core.adapter import thin_of
from rankloom.core.base import Base
from rankloom.core.kinds import Dense, product
from rankloom.core.known import known_as, still
from rankloom.core.selection import Selection
from rankloom.core.site import LAYER
from rankloom.core.slots import Anchor, own_bias, run, slot_table
from rankloom.core.thin import Thin
from rankloom.ops.fused import Change, Layer
from rankloom.store.base import Packed
from rankloom.store.bridges import bridge_for

PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Classes of tensors that autograd tracks plainly."""


class Seen(NamedTuple):
    """What layers are called with, the same for all of a group: the input, the dtype of its products, whether autocast
    chose that, why it cannot be fused ("": it can), who is active.
    """

    x: Any
    dtype: torch.dtype
    casts: bool
    why: str
    selection: Selection


def seen(x: Any, selection: Selection) -> Seen:
    """Look at an input once for all layers that read it."""
    if not (isinstance(x, Tensor) and type(x) in PLAIN and x.is_floating_point() and x.ndim > 1 and x.numel()):
        return Seen(x, torch.float32, False, "an input that is no plain tensor of floats, rows by columns", selection)
    why, dtype, casts = "", x.dtype, False
    if x.is_inference() or torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        why = "a transform of the forward pass"
    elif torch.autograd.forward_ad._current_level >= 0:
        why = "forward-mode differentiation"
    elif dtype != torch.float64 and not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype, casts = torch.get_autocast_dtype(x.device.type), True
    return Seen(x, dtype, casts, why, selection)


def part_of(layer: nn.Module, given: Seen) -> Layer | str:
    """The layer with the changes of all its active adapters, or why it takes the plain path."""
    anchor: Anchor | None = layer.__dict__.get("_rankloom")
    if anchor is None or anchor.kind is None:
        return "no adapter"
    if given.why or not anchor.selector.fused:
        return given.why or "switched off"
    notes, known = anchor.selector.notes, anchor.memo.known
    if known is not None and notes is None and still(known, layer, given.x, given.casts, given.selection):
        return known.part
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    cls: Any = type(layer)
    why = _unfit(cls, type(weight), type(bias), weight.requires_grad)  # type: ignore[arg-type]
    if why or "_hf_hook" in layer.__dict__:
        return why or "an offload hook moves its weights"
    if type(weight) in PLAIN and not weight.is_floating_point():
        return "its weight holds codes that its library has yet to take up (it was unpickled)"
    if weight.is_inference() or (bias is not None and bias.is_inference()):
        return "its weight was made in inference mode"
    kind, x = anchor.kind, given.x
    assert isinstance(kind, Dense)
    if weight.dtype != x.dtype and not given.casts and weight.is_floating_point():
        return f"an input of {x.dtype} on weights of {weight.dtype}"
    if weight.device != x.device or x.shape[-1] != kind.shape(layer)[-1]:
        return "an input that does not fit"
    base = Base(kind, layer, given.selection.context, notes)
    found = _thins(layer, base, given)
    if isinstance(found, str):
        return found
    if bias is not None and cls.rankloom_parameters:
        bias = own_bias(layer)  # type: ignore[assignment]
    part = _whole(base, weight, bias, found, x)
    if isinstance(part, str) or notes is not None or base.noted or type(weight) not in PLAIN:
        return part
    memo = anchor.memo
    if memo.anew is not given.selection and not given.selection.context:
        table = slot_table(layer, LAYER)
        adapters = [table[active.name] for active in given.selection.active if active.name in table]
        memo.known = known_as(part, layer, x, given.casts, given.selection, adapters)
        memo.anew = given.selection if memo.known is None else None
    return part


@cache
def _unfit(cls: Any, weight: type[Tensor], bias: type, trained: bool) -> str:
    """What a layer of a generated class, with a weight and bias of these classes, is that cannot be fused."""
    original, parameters = cls.rankloom_original, cls.rankloom_parameters
    if product(original) is None:
        return f"the forward of {original.__name__} is more than a linear product"
    if parameters not in ((), ("bias",)):
        return f"its {next(p for p in parameters if p != 'bias')} is adapted as a parameter too"
    if trained:
        return "its weight is trained itself"
    if not (weight in PLAIN or issubclass(weight, Packed) or bridge_for(weight) is not None):
        return f"its weight is a {weight.__name__}, which autograd does not track plainly"
    if bias not in (*PLAIN, type(None)):
        return f"its bias is a {bias.__name__}, which autograd does not track plainly"
    return ""


def _thins(layer: nn.Module, base: Base, given: Seen) -> list[tuple[Thin, float]] | str:
    """The thin forms of the active adapters with their weights."""
    table, found = slot_table(layer, LAYER), []
    for active in given.selection.active:
        adapter = table.get(active.name)
        if adapter is None:
            continue
        if active.rows is not None or not isinstance(active.weight, (int, float)):
            return "an adapter is weighted by rows or by a tensor"
        thin = thin_of(adapter, base, given.x)
        if thin is None:
            return f"{type(adapter).__name__}: {adapter.more_than_thin}"
        found.append((thin, active.weight))
    return found or "no adapter is active"


def _whole(base: Base, weight: Tensor, bias: Tensor | None, found: list[tuple[Thin, float]], x: Tensor) -> Layer | str:
    """Layer and changes in the form that the fused function takes, or why there is nothing to gain.

    Gains are folded into the factors, but that of a magnitude which is alone and does not drop out. Changes without
    dropout are one, side by side; each other one has an input of its own.
    """
    thin, factor = found[0]
    magnitude: Tensor | None = None
    gain: Tensor | None = None
    if len(found) == 1 and thin.magnitude is not None and not thin.dropout and factor == 1 and thin.bias is None:
        magnitude = thin.magnitude
    changes, still = list[Change](), list[tuple[Thin, float]]()
    for thin, factor in found:
        thin, column = forms.folded(thin), None
        if thin.magnitude is not None and magnitude is None:
            own = forms.gains(thin, base, square_norms(base))
            thin, moved = forms.ungained(thin, own), factor * (own - 1)
            if thin.dropout:
                column = moved
            else:
                gain = moved + (1 if gain is None else gain)
        if thin.bias is not None:
            shift = thin.bias if factor == 1 else factor * thin.bias
            bias = shift if bias is None else bias + shift
        if thin.dropout or len(found) == 1:
            inner = thin.inner
            if inner is not None and inner.shape[:-1] != x.shape[:-1]:
                inner = inner.expand(*x.shape[:-1], inner.shape[-1])
            changes.append(Change(thin.A, thin.B, thin.scale * factor, thin.dropout, inner, column))
        else:
            still.append((Thin(thin.A, thin.B, thin.scale, thin.inner), factor))
    if still:
        changes.append(_side_by_side(still, x))
    if not _trains(gain, magnitude, changes):
        return "nothing trains here"
    square, kind, layer = None if magnitude is None else square_norms(base), base.kind, base.layer
    assert isinstance(kind, Dense)
    if type(weight) in PLAIN:
        return Layer(kind.read(weight), None, bias, changes, gain, magnitude, square)
    if isinstance(weight, Packed):
        return Layer(weight, kind.read, bias, changes, gain, magnitude, square)
    return Layer(weight, lambda _: kind.matrix(layer), bias, changes, gain, magnitude, square, _Own(layer))


def _trains(gain: Tensor | None, magnitude: Tensor | None, changes: Sequence[Change]) -> bool:
    for change in changes:
        if change.A.requires_grad or change.B.requires_grad:
            return True
        if change.inner is not None and change.inner.requires_grad:
            return True
    return any(t is not None and t.requires_grad for t in (gain, magnitude))


def _side_by_side(each: Sequence[tuple[Thin, float]], x: Tensor) -> Change:
    """Changes of one input as one."""
    joined = forms.joined(each)
    assert joined is not None
    inner = joined.inner if joined.inner is None else joined.inner.expand(*x.shape[:-1], joined.inner.shape[-1])
    return Change(joined.A, joined.B, joined.scale, inner=inner)


class _Own:
    """The forward of a layer below its adapters: a product with kernels or rounding of its own."""

    __slots__ = ("layer",)

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = run(self.layer, type(self.layer).rankloom_forward, (x,), {})  # type: ignore[attr-defined]
        return y


def square_norms(base: Base) -> Tensor:
    """‖W‖² by rows (out,), in float32 at least: computed once for each frozen weight and version of it."""
    held = _held(base.kind.tensor(base.layer))
    memo = base.layer.__dict__["_rankloom"].memo
    key = (held._version, 0 if isinstance(held, FakeTensor) else held.data_ptr(), held.device)
    if memo.square is not None and memo.square[0]() is held and memo.square[1] == key:
        known: Tensor = memo.square[2]
        return known
    with torch.no_grad():
        matrix = base.matrix()
        square: Tensor = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).square().sum(-1)
    memo.square = (weakref.ref(held), key, square)
    return square


def _held(weight: Tensor) -> Tensor:
    """The first tensor inside a wrapper, else the weight: torch moves no wrapper that somebody refers to weakly."""
    while is_traceable_wrapper_subclass(weight):
        weight = getattr(weight, weight.__tensor_flatten__()[0][0])
    return weight
