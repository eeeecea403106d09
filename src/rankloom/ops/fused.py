"""Linear layers that read the same input, and their thin changes, as one autograd function.

y_i = g_i ∘ (x W_iᵀ + s_i·d_i(x) A_iᵀ B_iᵀ) + b_i, with d_i the dropout of the change's input, and for DoRA the gain
g_i = m_i/‖W_i + s_i B_i A_i‖ by rows (the norm is a constant), else 1. One thin product for all A, sums in place, and
nothing kept but h = d(x) Aᵀ, one bit of dropout an element, and x where an A is trained: rebuilt in backward where its
origin is known. Where the tokens and ranks are so many that it is cheaper, W_i + s_i B_i A_i is made for the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.ops.gain import scale_, scaled_and_summed
from rankloom.ops.order import Order, cheapest
from rankloom.ops.rebuild import Origin
from rankloom.ops.unpack import pack, unpack


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer: `read(weight)` is its frozen matrix (out, in), unpacked only for the product; bias (out,); A (r, in),
    B (out, r) of any dtype; `dropout` of the input of A; `magnitude` and `norms` (out,) for DoRA.
    """

    weight: Tensor
    read: Callable[[Tensor], Tensor]
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0
    magnitude: Tensor | None = None
    norms: Tensor | None = None


def fused(x: Tensor, layers: Sequence[Layer], origin: Origin | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs (…, out) of `layers` for x (…, in), computed in `dtype`; `origin` tells how backward rebuilds x."""
    inputs = origin.kept if origin is not None and origin.shortcut else (x,)
    factors = [t for layer in layers for t in (layer.A, layer.B, layer.magnitude)]
    call = _Call(x.detach(), tuple(layers), origin, dtype, len(inputs))
    with torch.autocast(x.device.type, enabled=False):
        return _Fused.apply(call, *inputs, *factors)  # type: ignore[no-untyped-call, no-any-return]


@dataclass(slots=True)
class _Call:
    """What one call knows beside its tensors; forward takes `x` out, asks which magnitudes are all `living` (not zero)
    and chooses the order.
    """

    x: Tensor | None
    layers: tuple[Layer, ...]
    origin: Origin | None
    dtype: torch.dtype
    inputs: int
    living: tuple[_Told | None, ...] = ()
    order: Order = Order.THIN

    def rebuilt(self, kept: Sequence[Tensor]) -> Tensor:
        x = kept[0] if self.origin is None else self.origin.make(tuple(kept))
        return x.to(self.dtype)


class _Told:
    """Whether a tensor of one element is true: asked where it is made, read once the device has come so far."""

    def __init__(self, flag: Tensor) -> None:
        self.flag = flag.to("cpu", non_blocking=True)
        self.ready: Any = torch.cuda.Event() if flag.is_cuda else None  # type: ignore[no-untyped-call]
        if self.ready is not None:
            self.ready.record()

    def __bool__(self) -> bool:
        if self.ready is not None:
            self.ready.synchronize()
        return bool(self.flag)


class _Kept(NamedTuple):
    """The tensors of one layer that backward needs; `b` is s·B in the dtype of the products."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    b: Tensor
    magnitude: Tensor | None
    gain: Tensor | None
    mask: Tensor | None
    y: Tensor | None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert call.x is not None
        x, call.x = call.x.to(call.dtype), None
        flat = x.reshape(-1, x.shape[-1])
        a = _stacked([layer.A for layer in call.layers]).to(call.dtype)
        bs = [(layer.B if layer.scale == 1 else layer.B * layer.scale).to(call.dtype) for layer in call.layers]
        gains = [_gain(layer.magnitude, layer.norms, call.dtype) for layer in call.layers]
        needs, trains = ctx.needs_input_grad[1 : 1 + call.inputs], ctx.needs_input_grad[1 + call.inputs :]
        call.order = _order(call, flat, any(needs), trains)
        thin, masks = _down(flat, a, call.layers) if call.order is Order.THIN else (None, [None] * len(call.layers))
        own, parts = _split(a, call.layers, dim=0), _split(thin, call.layers)
        ys = tuple(
            _up(x, flat, part, _matrix(call, layer, layer.weight, b, each), b, gain, layer)
            for part, each, b, gain, layer in zip(parts, own, bs, gains, call.layers)
        )
        linked = call.origin is not None and call.origin.shortcut and any(needs)
        kept: tuple[Tensor, ...] = ()
        if linked or any(trains[0::3]) or any(trains[2::3]):
            whole = tensors[0] if tensors[0].dtype == call.dtype else x
            kept = (whole,) if call.origin is None else call.origin.kept
        call.living = tuple(
            _Told(layer.magnitude.all()) if layer.magnitude is not None and trained else None
            for layer, trained in zip(call.layers, trains[2::3])
        )
        ctx.call, ctx.count, ctx.needs, ctx.trains = call, len(kept), needs, trains
        ctx.set_materialize_grads(False)
        rows = [
            _Kept(
                layer.weight,
                layer.bias,
                layer.A,
                layer.B,
                b,
                layer.magnitude,
                gain,
                mask,
                None if gain is None else y,
            )
            for layer, b, gain, mask, y in zip(call.layers, bs, gains, masks, ys)
        ]
        again = kept and any(layer.norms is not None for layer in call.layers) and all(mask is None for mask in masks)
        h = thin if any(trains[1::3]) and not again else None
        ctx.save_for_backward(*kept, h, a, *(t for row in rows for t in row))
        return ys

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        saved, width = ctx.saved_tensors, len(_Kept._fields)
        kept, (h, a), rest = saved[: ctx.count], saved[ctx.count : ctx.count + 2], saved[ctx.count + 2 :]
        rows = [_Kept(*rest[i : i + width]) for i in range(0, len(rest), width)]
        if torch.is_grad_enabled():
            return _twice(ctx, kept, rows, dys)
        return _once(ctx, kept, h, a, rows, dys)


def _down(flat: Tensor, a: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, list[Tensor | None]]:
    """h (T, Σr) of all layers, whose A are stacked in `a` (Σr, in), and the packed masks of those that drop."""
    if not any(layer.dropout for layer in layers):
        return flat @ a.T, [None] * len(layers)
    parts, masks = [], []
    for layer, own in zip(layers, _split(a, layers, dim=0)):
        dropped, mask = flat, None
        if layer.dropout:
            dropped, mask = torch.native_dropout(flat, layer.dropout, True)
            mask = pack(mask.flatten(), 1)
        parts.append(dropped @ own.T)
        masks.append(mask)
    return torch.cat(parts, dim=1), masks


def _order(call: _Call, flat: Tensor, dx: bool, trains: Sequence[bool]) -> Order:
    """The cheapest order; the thin one where a sum with W would lose small changes (16 bits), where the change has an
    input of its own (dropout), and where a frozen factor takes x or products off.
    """
    wide = call.dtype in (torch.float32, torch.float64)
    if not wide or any(layer.dropout for layer in call.layers) or not (all(trains[0::3]) and all(trains[1::3])):
        return Order.THIN
    shapes = tuple(((layer.B.shape[0], layer.A.shape[1]), layer.A.shape[0]) for layer in call.layers)
    return cheapest(flat.shape[0], shapes, dx)


def _matrix(call: _Call, layer: Layer, weight: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """W, or in the other orders W + s·B A, (out, in) in the dtype of the products."""
    matrix = layer.read(weight).to(call.dtype)
    return matrix if call.order is Order.THIN else torch.addmm(matrix, b, a)


def _up(
    x: Tensor, flat: Tensor, h: Tensor | None, matrix: Tensor, b: Tensor, gain: Tensor | None, layer: Layer
) -> Tensor:
    """The output (…, out) of one layer; `h` is what its matrix has not in it."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    y = F.linear(flat, matrix, bias if gain is None else None)
    if h is not None:
        _add_product(y, h, b.T)
    if gain is not None:
        scale_(y, gain)
        if bias is not None:
            y.add_(bias)
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])  # type: ignore[no-any-return]


def _once(
    ctx: Any, kept: Sequence[Tensor], h: Tensor | None, a: Tensor, rows: list[_Kept], dys: Sequence[Tensor | None]
) -> Any:
    """The gradients of all inputs of the function."""
    call: _Call = ctx.call
    linked = call.origin is not None and call.origin.shortcut
    leaves = [t.detach().requires_grad_(n) for t, n in zip(kept, ctx.needs)] if linked else kept
    with torch.set_grad_enabled(linked):
        x = call.rebuilt(leaves) if kept else None
    flat = None if x is None else x.detach().reshape(-1, x.shape[-1])
    if h is None and flat is not None and any(ctx.trains[1::3]) and call.order is not Order.DENSE:
        h, _ = _down(flat, a, call.layers)
    dx, grads = _sum(call, ctx.needs, ctx.trains, flat, h, a, rows, dys)
    shape = next((dy.shape[:-1] for dy in dys if dy is not None), None)
    if dx is None or shape is None:
        return None, *[None] * call.inputs, *grads
    dx = dx.view(*shape, dx.shape[-1])
    if not linked:
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
    dx: Tensor | None = None
    parts, own = _split(h, call.layers), _split(a, call.layers, dim=0)
    thin: list[tuple[int, _Kept, Tensor]] = []
    for i, (layer, row, part, dy) in enumerate(zip(call.layers, rows, parts, dys)):
        if dy is None:
            continue
        dy = dy.reshape(-1, dy.shape[-1])
        if trains[3 * i + 2]:
            dy, grads[3 * i + 2] = _magnitude(layer, row, flat, dy, call.living[i])
        elif row.gain is not None:
            dy = dy * row.gain
        if call.order is Order.DENSE:
            assert flat is not None
            whole = dy.T @ flat
            grads[3 * i] = (row.b.T @ whole).to(row.A.dtype)
            grads[3 * i + 1] = (whole @ own[i].T).to(row.B.dtype).mul_(layer.scale)
        else:
            thin.append((i, row, dy @ row.b))
        if trains[3 * i + 1] and part is not None:
            grads[3 * i + 1] = (dy.T @ part).to(row.B.dtype).mul_(layer.scale)
        if any(needs):
            matrix = _matrix(call, layer, row.weight, row.b, own[i])
            dx = dy @ matrix if dx is None else _add_product(dx, dy, matrix)
    through = dx if call.order is Order.THIN else None
    _through_a(trains, flat, through, a, own, [part for part in thin if not call.layers[part[0]].dropout], grads)
    for i, row, dh in thin:
        if call.layers[i].dropout:
            mask = _mask(row, call.layers[i], dh)
            if dx is not None:
                dx.addcmul_(dh @ own[i], mask)
            if flat is not None and trains[3 * i]:
                grads[3 * i] = (dh.T @ (flat * mask)).to(row.A.dtype)
    return dx, grads


def _through_a(
    trains: Sequence[bool],
    flat: Tensor | None,
    dx: Tensor | None,
    a: Tensor,
    own: Sequence[Tensor],
    thin: list[tuple[int, _Kept, Tensor]],
    grads: list[Tensor | None],
) -> None:
    """What comes through A (`own`, all of them in `a`) of layers without dropout, at once: to dx, and into `grads`."""
    if not thin:
        return
    dh = thin[0][2] if len(thin) == 1 else torch.cat([dh for *_, dh in thin], dim=1)
    if dx is not None:
        _add_product(dx, dh, a if len(thin) == len(own) else _stacked([own[i] for i, *_ in thin]))
    if flat is not None and any(trains[3 * i] for i, *_ in thin):
        found = (dh.T @ flat).to(thin[0][1].A.dtype)
        pieces = torch.split_with_sizes(found, [row.A.shape[0] for _, row, _ in thin])
        for (i, row, _), piece in zip(thin, pieces):
            grads[3 * i] = piece.to(row.A.dtype) if trains[3 * i] else None


def _magnitude(
    layer: Layer, row: _Kept, flat: Tensor | None, dy: Tensor, living: _Told | None
) -> tuple[Tensor, Tensor]:
    """g∘dy, and the magnitude's gradient Σ_t dy∘(x W'ᵀ)/‖W'‖, read off the output: Σ_t dy∘(y − b)/m; where m = 0 (not
    all are `living`) the output has forgotten it.
    """
    assert row.magnitude is not None
    assert row.gain is not None
    assert row.y is not None
    assert layer.norms is not None
    assert flat is not None
    magnitude, wide = row.magnitude, layer.norms.dtype
    gained, total = scaled_and_summed(dy, row.y.reshape(dy.shape), row.gain, wide)
    if row.bias is not None:
        total -= row.bias.to(wide) * dy.sum(0, dtype=wide)
    found = total / magnitude
    if not living:
        gone = (magnitude == 0).nonzero().flatten()
        matrix = layer.read(row.weight)[gone].to(wide) + layer.scale * row.B[gone].to(wide) @ row.A.to(wide)
        found[gone] = (dy[:, gone].to(wide) * (flat.to(wide) @ matrix.T)).sum(0) / layer.norms[gone]
    return gained, found.masked_fill_(layer.norms == 0, 0.0).to(magnitude.dtype)


def _twice(ctx: Any, kept: Sequence[Tensor], rows: list[_Kept], dys: Sequence[Tensor | None]) -> Any:
    """The same gradients by differentiable operations, for derivatives of higher order."""
    call: _Call = ctx.call
    with torch.enable_grad():
        x = call.rebuilt(kept) if kept else None
        if x is None or (any(ctx.needs) and not x.requires_grad):
            raise RuntimeError(
                "derivatives of higher order need the layer's input, which a frozen A and autocast let go: "
                "set `model.rankloom.switch.fused = False` for them"
            )
        inputs = kept if call.origin is not None and call.origin.shortcut else (x,)
        ys = [_plainly(x, layer, row) for layer, row in zip(call.layers, rows)]
        given = [(y, dy) for y, dy in zip(ys, dys) if dy is not None]
        asked = [*inputs, *(t for row in rows for t in (row.A, row.B, row.magnitude))]
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
    dropped = x if row.mask is None else x * _mask(row, layer, x)
    b = (row.B * layer.scale).to(x.dtype)
    y = F.linear(x, layer.read(row.weight).to(x.dtype)) + dropped @ row.A.to(x.dtype).T @ b.T
    gain = _gain(row.magnitude, layer.norms, x.dtype)
    y = y if gain is None else y * gain
    return y if row.bias is None else y + row.bias.to(x.dtype)


def _gain(magnitude: Tensor | None, norms: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """m/‖W'‖ (out,), 1 where the norm is zero; None without a magnitude."""
    if magnitude is None or norms is None:
        return None
    gone = norms == 0
    return (magnitude / norms.masked_fill(gone, 1.0)).masked_fill(gone, 1.0).to(dtype)


def _mask(row: _Kept, layer: Layer, like: Tensor) -> Tensor:
    """What dropout multiplied the input with: 0 or 1/(1 − p), (T, in)."""
    assert row.mask is not None
    width = row.A.shape[-1]
    count = like.numel() // like.shape[-1]
    kept = unpack(row.mask, 1, count * width).view(*like.shape[:-1], width)
    return kept.to(like.dtype).mul_(1 / (1 - layer.dropout))


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """into += a b (torch's counter of operations counts no `addmm_`)."""
    return torch.addmm(into, a, b, out=into)


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
