"""Linear layers that read the same input, and their thin changes, as one autograd function.

y_i = g_i ∘ (x W_iᵀ + s_i·d_i(x) A_iᵀ B_iᵀ) + b_i, with d_i the dropout of the change's input, and for DoRA the gain
g_i = m_i/‖W_i + s_i B_i A_i‖ by rows (the norm is a constant), else 1. One thin product for all A, sums in place, and
nothing kept but h = d(x) Aᵀ, one bit of dropout an element or its seed, and x where an A is trained: rebuilt in
backward where its origin is known. Where the tokens and ranks are so many that it is cheaper, W_i + s_i B_i A_i is made
for the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.ops.dropout import drop, masked
from rankloom.ops.gain import by_norms, gain_of, remembers, scale_, scaled_and_summed
from rankloom.ops.linalg import row_norms
from rankloom.ops.order import Order, cheapest
from rankloom.ops.rebuild import Origin


class Layer(NamedTuple):
    """One layer: `read(weight)` is its frozen matrix (out, in), unpacked only for the product; bias (out,); A (r, in),
    B (out, r) of any dtype; `dropout` of the input of A; `magnitude` and ‖W‖² by rows, `square`
    (out,), for DoRA.
    """

    weight: Tensor
    read: Callable[[Tensor], Tensor]
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0
    magnitude: Tensor | None = None
    square: Tensor | None = None


def fused(x: Tensor, layers: Sequence[Layer], origin: Origin | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs (…, out) of `layers` for x (…, in), computed in `dtype`; `origin` tells how backward rebuilds x."""
    linked = origin is not None and origin.shortcut
    inputs = origin.kept if origin is not None and linked else (x,)
    factors = [t for layer in layers for t in (layer.A, layer.B, layer.magnitude)]
    kept, make = (None, None) if origin is None else (origin.kept, origin.make)
    call = _Call(tuple(layers), dtype, len(inputs), linked, make, _Input(x, kept))
    with torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) else _AS_IT_IS:
        return _Fused.apply(call, *inputs, *factors)  # type: ignore[no-untyped-call, no-any-return]


_AS_IT_IS = nullcontext()


class _Input(NamedTuple):
    """What forward takes: the input, and what it is rebuilt from if not from itself."""

    x: Tensor
    kept: tuple[Tensor, ...] | None


@dataclass(slots=True)
class _Call:
    """What one call knows beside its tensors. `make` rebuilds x, which is `linked` to what it is made from, past x.

    Forward takes `given` out and chooses the order.
    """

    layers: tuple[Layer, ...]
    dtype: torch.dtype
    inputs: int
    linked: bool
    make: Callable[[tuple[Tensor, ...]], Tensor] | None
    given: _Input | None
    order: Order = Order.THIN

    def rebuilt(self, kept: Sequence[Tensor]) -> Tensor:
        x = kept[0] if self.make is None else self.make(tuple(kept))
        return _in(x, self.dtype)


class _Kept(NamedTuple):
    """The tensors of one layer that backward needs; `b` is s·B in the dtype of the products, and `y` times the gradient
    of the output, summed up and times `inverse`, is the magnitude's.
    """

    weight: Tensor
    b: Tensor
    gain: Tensor | None = None
    inverse: Tensor | None = None
    y: Tensor | None = None
    mask: Tensor | None = None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert call.given is not None
        (x, origins), call.given = call.given, None
        layers, dtype = call.layers, call.dtype
        x = _in(x, dtype)
        flat = x.reshape(-1, x.shape[-1])
        a = _in(_stacked([layer.A for layer in layers]), dtype)
        bs = [_scaled(layer.B, layer.scale, dtype) for layer in layers]
        needed = ctx.needs_input_grad
        needs, trains = needed[1 : 1 + call.inputs], needed[1 + call.inputs :]
        call.order = _order(call, flat, any(needs), trains)
        thin, masks = _down(flat, a, layers) if call.order is Order.THIN else (None, [])
        parts, own = _split(thin, layers), _split(a, layers, dim=0)
        gained = any(layer.magnitude is not None for layer in layers)
        ys, rows = [], []
        for layer, part, each, b in zip(layers, parts, own, bs):
            matrix = layer.read(layer.weight)
            gain, inverse = _gain(layer, matrix, dtype)
            y, told = _up(x, flat, part, _matrix(call, matrix, b, each), b, gain, layer)
            ys.append(y)
            rows.append((gain, inverse, told))
        kept: tuple[Tensor, ...] = ()
        if (call.linked and any(needs)) or any(trains[0::3]):
            whole = tensors[0] if tensors[0].dtype == dtype else x
            kept = (whole,) if origins is None else origins
        h = thin if any(trains[1::3]) and not (kept and gained and not masks) else None
        columns: list[Sequence[Tensor | None]] = [[layer.weight for layer in layers], bs]
        columns += zip(*rows) if gained or masks else []
        columns += [masks] if masks else []
        ctx.call, ctx.count, ctx.needs, ctx.trains = call, len(kept), needs, trains
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, h, a, *chain.from_iterable(columns))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        saved, width = ctx.saved_tensors, len(ctx.call.layers)
        kept, h, a, rest = saved[: ctx.count], saved[ctx.count], saved[ctx.count + 1], saved[ctx.count + 2 :]
        rows = [_Kept(*row) for row in zip(*(rest[i : i + width] for i in range(0, len(rest), width)))]
        if torch.is_grad_enabled():
            return _twice(ctx, kept, rows, dys)
        return _once(ctx, kept, h, a, rows, dys)


def _in(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s·B in `dtype`, rounded once."""
    if scale == 1:
        return b.to(dtype)
    return b * scale if b.dtype == dtype else torch.mul(b, scale, out=torch.empty_like(b, dtype=dtype))


def _down(flat: Tensor, a: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, list[Tensor | None]]:
    """h (T, Σr) of all layers, whose A are stacked in `a` (Σr, in), and, if any drops, what tells the mask of each."""
    if not any(layer.dropout for layer in layers):
        return flat @ a.T, []
    parts, masks = [], []
    for layer, own in zip(layers, _split(a, layers, dim=0)):
        dropped, mask = drop(flat, layer.dropout) if layer.dropout else (flat, None)
        parts.append(dropped @ own.T)
        masks.append(mask)
    return torch.cat(parts, dim=1), masks


def _order(call: _Call, flat: Tensor, dx: bool, trains: Sequence[bool]) -> Order:
    """The cheapest order; the thin one where a sum with W would lose small changes (16 bits), where the change has an
    input of its own (dropout), and where a frozen factor takes x or products off.
    """
    if call.dtype not in (torch.float32, torch.float64):
        return Order.THIN
    if any(layer.dropout for layer in call.layers) or not (all(trains[0::3]) and all(trains[1::3])):
        return Order.THIN
    shapes = tuple(((layer.B.shape[0], layer.A.shape[1]), layer.A.shape[0]) for layer in call.layers)
    return cheapest(flat.shape[0], shapes, dx)


def _matrix(call: _Call, matrix: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """W, or in the other orders W + s·B A, (out, in) in the dtype of the products."""
    matrix = _in(matrix, call.dtype)
    return matrix if call.order is Order.THIN else torch.addmm(matrix, b, a)


def _up(
    x: Tensor, flat: Tensor, h: Tensor | None, matrix: Tensor, b: Tensor, gain: Tensor | None, layer: Layer
) -> tuple[Tensor, Tensor | None]:
    """The output (…, out) of one layer, and for DoRA what tells the magnitude's gradient; `h` is what its matrix has
    not in it.
    """
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    inner = bias if gain is None else None
    if h is not None and x.is_cuda:
        y = x.new_empty((*x.shape[:-1], matrix.shape[0]))
        rows = y.view(-1, y.shape[-1])
        torch.mm(h, b.T, out=rows) if inner is None else torch.addmm(inner, h, b.T, out=rows)
        _add_product(rows, flat, matrix.T)
    else:
        y = F.linear(x, matrix, inner)
        rows = y.view(-1, y.shape[-1])
        if h is not None:
            _add_product(rows, h, b.T)
    if gain is None:
        return y, None
    if _tells(layer, y.dtype):
        scale_(rows, gain)
        return y, y
    return (y * gain if bias is None else torch.addcmul(bias, y, gain)), y


def _tells(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether the magnitude's gradient can be read off the layer's output."""
    return layer.bias is None and remembers(dtype)


def _once(
    ctx: Any, kept: Sequence[Tensor], h: Tensor | None, a: Tensor, rows: list[_Kept], dys: Sequence[Tensor | None]
) -> Any:
    """The gradients of all inputs of the function."""
    call: _Call = ctx.call
    leaves = [t.detach().requires_grad_(n) for t, n in zip(kept, ctx.needs)] if call.linked else kept
    with torch.enable_grad() if call.linked else _AS_IT_IS:
        x = call.rebuilt(leaves) if kept else None
    flat = None if x is None else x.detach().reshape(-1, x.shape[-1])
    if h is None and flat is not None and any(ctx.trains[1::3]) and call.order is not Order.DENSE:
        h, _ = _down(flat, a, call.layers)
    dx, grads = _sum(call, ctx.needs, ctx.trains, flat, h, a, rows, dys)
    shape = next((dy.shape[:-1] for dy in dys if dy is not None), None)
    if dx is None or shape is None:
        return None, *[None] * call.inputs, *grads
    dx = dx.view(*shape, dx.shape[-1])
    if not call.linked:
        return None, dx, *grads
    wanted = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(x, wanted, dx))  # type: ignore[arg-type]
    return None, *[next(found) if t.requires_grad else None for t in leaves], *grads


def _sum(
    call: _Call,
    needs: Sequence[bool],
    trains: Sequence[bool],
    flat: Tensor | None,
    h: Tensor | None,
    a: Tensor,
    rows: list[_Kept],
    dys: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx (T, in), where it is needed, and the gradients of A, B, magnitude of every layer."""
    grads: list[Tensor | None] = [None] * len(trains)
    parts, own = _split(h, call.layers), _split(a, call.layers, dim=0)
    wide: list[tuple[int, _Kept, Tensor]] = []
    thin: list[tuple[int, _Kept, Tensor]] = []
    for i, (layer, row, part, dy) in enumerate(zip(call.layers, rows, parts, dys)):
        if dy is None:
            continue
        dy = dy.reshape(-1, dy.shape[-1])
        if trains[3 * i + 2]:
            assert layer.magnitude is not None
            assert row.gain is not None
            assert row.inverse is not None
            assert row.y is not None
            dy, total = scaled_and_summed(dy, row.y.view(dy.shape), row.gain, row.inverse.dtype)
            grads[3 * i + 2] = (total * row.inverse).to(layer.magnitude.dtype)
        elif row.gain is not None:
            dy = dy * row.gain
        wide.append((i, row, dy))
        if call.order is Order.DENSE:
            assert flat is not None
            whole = dy.T @ flat
            grads[3 * i] = (row.b.T @ whole).to(layer.A.dtype)
            grads[3 * i + 1] = _times(whole @ own[i].T, layer)
        else:
            thin.append((i, row, dy @ row.b))
            if trains[3 * i + 1] and part is not None:
                grads[3 * i + 1] = _times(_product(dy.T, part, layer.B.dtype), layer)
    plain = [part for part in thin if not call.layers[part[0]].dropout]
    dx = _through_a(call, any(needs), trains, flat, a, own, plain, grads)
    if any(needs):
        for i, row, dy in wide:
            matrix = _matrix(call, call.layers[i].read(row.weight), row.b, own[i])
            dx = dy @ matrix if dx is None else _add_product(dx, dy, matrix)
    for i, row, dh in thin:
        if row.mask is not None:
            layer = call.layers[i]
            if dx is not None:
                masked(dh @ own[i], row.mask, layer.dropout, into=dx)
            if flat is not None and trains[3 * i]:
                grads[3 * i] = _product(dh.T, masked(flat, row.mask, layer.dropout), layer.A.dtype)
    return dx, grads


def _times(found: Tensor, layer: Layer) -> Tensor:
    """The gradient of B from that of s·B."""
    found = _in(found, layer.B.dtype)
    return found if layer.scale == 1 else found.mul_(layer.scale)


def _through_a(
    call: _Call,
    dx: bool,
    trains: Sequence[bool],
    flat: Tensor | None,
    a: Tensor,
    own: Sequence[Tensor],
    thin: list[tuple[int, _Kept, Tensor]],
    grads: list[Tensor | None],
) -> Tensor | None:
    """What comes through A (`own`, all of them in `a`) of layers without dropout, at once: the part of dx, where that
    is asked for and the layers' matrices have it not in them, and the gradients of A, into `grads`.
    """
    if not thin:
        return None
    dh = thin[0][2] if len(thin) == 1 else torch.cat([dh for *_, dh in thin], dim=1)
    if flat is not None and any(trains[3 * i] for i, *_ in thin):
        found = _product(dh.T, flat, call.layers[0].A.dtype)
        pieces = _split(found, [call.layers[i] for i, *_ in thin], dim=0)
        for (i, *_), piece in zip(thin, pieces):
            grads[3 * i] = _in(piece, call.layers[i].A.dtype) if trains[3 * i] else None
    if not dx or call.order is not Order.THIN:
        return None
    return dh @ (a if len(thin) == len(own) else _stacked([own[i] for i, *_ in thin]))


def _twice(ctx: Any, kept: Sequence[Tensor], rows: list[_Kept], dys: Sequence[Tensor | None]) -> Any:
    """The same gradients by differentiable operations, for derivatives of higher order."""
    call: _Call = ctx.call
    with torch.enable_grad():
        x = call.rebuilt(kept) if kept else None
        if x is None or (any(ctx.needs) and not x.requires_grad):
            raise RuntimeError(
                "derivatives of higher order need the layer's input, which a frozen A and autocast let go: "
                "set `model.rankloom.selector.fused = False` for them"
            )
        inputs = kept if call.linked else (x,)
        ys = [_plainly(x, layer, row) for layer, row in zip(call.layers, rows)]
        given = [(y, dy) for y, dy in zip(ys, dys) if dy is not None]
        asked = [*inputs, *(t for layer in call.layers for t in (layer.A, layer.B, layer.magnitude))]
        wanted = [t for t, need in zip(asked, (*ctx.needs, *ctx.trains)) if need and t is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in given],
                wanted,
                [dy for _, dy in given],
                create_graph=True,
                allow_unused=True,
            )
        )
    return None, *[next(found) if need else None for need in (*ctx.needs, *ctx.trains)]


def _plainly(x: Tensor, layer: Layer, row: _Kept) -> Tensor:
    """The output of one layer, without anything in place."""
    flat = x.reshape(-1, x.shape[-1])
    dropped = x if row.mask is None else x * masked(torch.ones_like(flat), row.mask, layer.dropout).view(x.shape)
    a, b, matrix = layer.A.to(x.dtype), (layer.B * layer.scale).to(x.dtype), layer.read(row.weight)
    y = F.linear(x, matrix.to(x.dtype)) + dropped @ a.T @ b.T
    if layer.magnitude is not None:
        norms = row_norms(matrix, layer.A.detach(), layer.B.detach(), layer.scale, layer.square)
        y = y * by_norms(layer.magnitude, norms, x.dtype, gained=False)[0]
    return y if layer.bias is None else y + layer.bias.to(x.dtype)


def _gain(layer: Layer, matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """m/‖W'‖ (out,) with its `inverse` (`ops.gain.gain_of`); Nones without a magnitude."""
    if layer.magnitude is None or layer.square is None:
        return None, None
    told = _tells(layer, dtype)
    return gain_of(matrix, layer.A, layer.B, layer.scale, layer.square, layer.magnitude, dtype, told)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """into += a b (torch's counter of operations counts no `addmm_`)."""
    return torch.addmm(into, a, b, out=into)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`; on a GPU 16-bit factors are summed up in it and not rounded between."""
    if a.is_cuda and dtype is torch.float32 and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=dtype)
    return _in(a @ b, dtype)


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """All A, (Σr, in)."""
    return factors[0] if len(factors) == 1 else torch.cat(list(factors))


@overload
def _split(stacked: Tensor, layers: Sequence[Layer], dim: int = 1) -> Sequence[Tensor]: ...
@overload
def _split(stacked: Tensor | None, layers: Sequence[Layer], dim: int = 1) -> Sequence[Tensor | None]: ...
def _split(stacked: Tensor | None, layers: Sequence[Layer], dim: int = 1) -> Sequence[Tensor | None]:
    """The parts of what is stacked by rank."""
    if stacked is None:
        return [None] * len(layers)
    if len(layers) == 1:
        return (stacked,)
    return torch.split_with_sizes(stacked, [layer.A.shape[0] for layer in layers], dim=dim)
