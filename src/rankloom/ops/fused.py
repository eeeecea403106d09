"""Linear layers that read the same input, and their thin changes, as one autograd function.

y = G ∘ (W x) + b + Σ_c (s_c·B_c (e_c ∘ A_c d_c(x)) + v_c ∘ (W d_c(x))) for each layer, with d_c the dropout of a
change, e_c by token, G and v_c (out,); for DoRA without dropout y = g ∘ (W x + s·B A x) + b with the gain
g = m/‖W + s·B A‖ by rows (the norm is a constant). One thin product for all A, sums in place, and nothing kept but
h = d(x) Aᵀ, one bit of dropout an element or its seed, and x where an A is trained: rebuilt in backward where its
origin is known. Where the tokens and ranks are so many that it is cheaper, W + s·B A is made for the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.ops.dropout import drop, masked
from rankloom.ops.gain import by_norms, gain_of, remembers, scale_, scaled_and_summed
from rankloom.ops.linalg import row_norms
from rankloom.ops.order import Order, cheapest
from rankloom.ops.rebuild import Origin


class Change(NamedTuple):
    """One thin change: A (r, in), B (out, r) of any dtype; `dropout` of its input; `inner` (…, r) by token; `column`
    (out,): how much of W d(x) is in it beside.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    dropout: float = 0.0
    inner: Tensor | None = None
    column: Tensor | None = None


class Layer(NamedTuple):
    """One layer: `read(weight)` is its frozen matrix (out, in), unpacked only for the product; bias (out,); `gain`
    (out,) of the product with the matrix alone, or `magnitude` and ‖W‖² by rows, `square` (out,), of a DoRA that is the
    only change; `product`: the layer's own x ↦ W x + b, where it has kernels or rounding of its own.
    """

    weight: Tensor
    read: Callable[[Tensor], Tensor]
    bias: Tensor | None
    changes: tuple[Change, ...]
    gain: Tensor | None = None
    magnitude: Tensor | None = None
    square: Tensor | None = None
    product: Callable[[Tensor], Tensor] | None = None


OF_LAYER, OF_CHANGE = 3, 4
"""Differentiable tensors: bias, gain, magnitude of a layer; A, B, inner, column of a change."""


def fused(x: Tensor, layers: Sequence[Layer], origin: Origin | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs (…, out) of `layers` for x (…, in), computed in `dtype`; `origin` tells how backward rebuilds x."""
    linked = origin is not None and origin.shortcut
    inputs = origin.kept if origin is not None and linked else (x,)
    tensors: list[Tensor | None] = []
    for layer in layers:
        tensors += layer.bias, layer.gain, layer.magnitude
        for change in layer.changes:
            tensors += change.A, change.B, change.inner, change.column
    kept, make = (None, None) if origin is None else (origin.kept, origin.make)
    call = _Call(tuple(layers), dtype, len(inputs), linked, make, _Input(x, kept))
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _Fused.apply(call, *inputs, *tensors)  # type: ignore[no-untyped-call, no-any-return]
    return _Fused.apply(call, *inputs, *tensors)  # type: ignore[no-untyped-call, no-any-return]


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
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def places(self) -> list[tuple[int, list[int]]]:
        """Where the tensors of each layer, and those of its changes, begin among all."""
        found, at = list[tuple[int, list[int]]](), 0
        for layer in self.layers:
            stop = at + OF_LAYER + OF_CHANGE * len(layer.changes)
            found.append((at, list(range(at + OF_LAYER, stop, OF_CHANGE))))
            at = stop
        return found


class _OfLayer(NamedTuple):
    """The tensors of one layer that backward needs: `y` times the gradient of the output, summed up (and times
    `inverse`), is that of the gain (the magnitude).
    """

    weight: Tensor
    gain: Tensor | None
    inverse: Tensor | None
    y: Tensor | None


class _OfChange(NamedTuple):
    """Those of one change: `b` is s·B in the dtype of the products, `mask` tells the dropout, `base` is W d(x)."""

    b: Tensor
    inner: Tensor | None
    column: Tensor | None
    mask: Tensor | None
    base: Tensor | None
    h: Tensor | None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        assert call.given is not None
        (x, origins), call.given = call.given, None
        layers, dtype = call.layers, call.dtype
        x = x if x.dtype == dtype else x.to(dtype)
        flat = x.reshape(-1, x.shape[-1])
        changes = [change for layer in layers for change in layer.changes]
        ranks = [change.A.shape[0] for change in changes]
        a = changes[0].A if len(changes) == 1 else torch.cat([change.A for change in changes])
        a = a if a.dtype == dtype else a.to(dtype)
        needed = ctx.needs_input_grad
        needs, trains = needed[1 : 1 + call.inputs], needed[1 + call.inputs :]
        firsts = [at for _, places in call.places() for at in places]
        trains_a, trains_b = any(trains[at] for at in firsts), any(trains[at + 1] for at in firsts)
        drops = any(change.dropout for change in changes)
        call.order = _order(call, changes, flat, any(needs), all(trains[at] and trains[at + 1] for at in firsts))
        own: Sequence[Tensor] = (a,) if len(ranks) == 1 else torch.split_with_sizes(a, ranks)
        hs: Sequence[Tensor | None] = [None] * len(ranks)
        if call.order is Order.THIN and not drops:
            h = flat @ a.T
            hs = (h,) if len(ranks) == 1 else torch.split_with_sizes(h, ranks, dim=1)
        by_token = any(change.inner is not None for change in changes)
        recompute = not drops and not by_token and any(layer.magnitude is not None for layer in layers)
        ys, of_layers, of_changes, at = list[Tensor](), list[Tensor | None](), list[Tensor | None](), 0
        for layer in layers:
            stop = at + len(layer.changes)
            y, kept_of_layer, kept_of_changes = _output(call, layer, x, flat, own[at:stop], hs[at:stop])
            ys.append(y)
            of_layers += kept_of_layer
            for of_change in kept_of_changes:
                of_changes += of_change
            at = stop
        kept: tuple[Tensor, ...] = ()
        if (call.linked and any(needs)) or trains_a:
            whole = tensors[0] if tensors[0] is not None and tensors[0].dtype == dtype else x
            kept = (whole,) if origins is None else origins
        if not trains_b or (kept and recompute):
            for i, change in enumerate(changes):
                of_changes[6 * i + 5] = None if change.inner is None else of_changes[6 * i + 5]
        ctx.call, ctx.count, ctx.needs, ctx.trains = call, len(kept), needs, trains
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, a, *of_layers, *of_changes)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        saved, call = ctx.saved_tensors, ctx.call
        start = ctx.count + 1
        kept, a, middle = saved[: ctx.count], saved[ctx.count], start + 4 * len(call.layers)
        of_layers = [_OfLayer(*saved[i : i + 4]) for i in range(start, middle, 4)]
        of_changes = [_OfChange(*saved[i : i + 6]) for i in range(middle, len(saved), 6)]
        if torch.is_grad_enabled():
            return _twice(ctx, kept, of_layers, of_changes, dys)
        return _once(ctx, kept, a, of_layers, of_changes, dys)


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s·B in `dtype`, rounded once."""
    if scale == 1:
        return b.to(dtype)
    return b * scale if b.dtype == dtype else torch.mul(b, scale, out=torch.empty_like(b, dtype=dtype))


def _order(
    call: _Call, changes: Sequence[Change], flat: Tensor, dx: bool, all_train: bool
) -> Order:
    """The cheapest order; the thin one where a sum with W would lose small changes (16 bits), where a change has an
    input of its own (dropout) or numbers by token, where W has a product or a gain of its own, and where a frozen
    factor takes x or products off.
    """
    if call.dtype not in (torch.float32, torch.float64) or not all_train:
        return Order.THIN
    if any(change.dropout or change.inner is not None for change in changes):
        return Order.THIN
    if any(layer.product is not None or layer.gain is not None for layer in call.layers):
        return Order.THIN
    shapes = tuple(((change.B.shape[0], change.A.shape[1]), change.A.shape[0]) for change in changes)
    return cheapest(flat.shape[0], shapes, dx)


def _output(
    call: _Call, layer: Layer, x: Tensor, flat: Tensor, own: Sequence[Tensor], hs: Sequence[Tensor | None]
) -> tuple[Tensor, _OfLayer, list[_OfChange]]:
    """The output (…, out) of one layer, and what backward needs of it and of its changes; `own`: their A; `hs`: x Aᵀ
    where it is known already.
    """
    dtype, changes, late = call.dtype, layer.changes, layer.gain is not None or layer.magnitude is not None
    bs = [_scaled(change.B, change.scale, dtype) for change in changes]
    bias = layer.bias if layer.bias is None or layer.bias.dtype == dtype else layer.bias.to(dtype)
    matrix = gain = inverse = None
    if layer.product is None or layer.magnitude is not None:
        matrix = layer.read(layer.weight)
        if layer.magnitude is not None:
            gain, inverse = _gain_and_inverse(layer, matrix, dtype)
        matrix = matrix if matrix.dtype == dtype else matrix.to(dtype)
        matrix = matrix if call.order is Order.THIN else _merged(matrix, bs, own)
    y, done = _base(layer, x, flat, matrix, None if late else bias, bs, hs), layer.gain is None and _early(layer, x, hs)
    before = None
    if layer.gain is not None:
        gain, before = layer.gain.to(dtype), y
        y = y * gain if bias is None else torch.addcmul(bias, y, gain)
    rows, of_changes = y.view(-1, y.shape[-1]), []
    for i, (change, a, b, h) in enumerate(zip(changes, own, bs, hs)):
        mask = base = inner = None
        if change.dropout:
            dropped, mask = drop(flat, change.dropout)
            h = dropped @ a.T
            if change.column is not None:
                base = _product_with(layer, dropped, matrix, bias)
                rows.addcmul_(base, change.column.to(dtype))
        elif h is None and call.order is Order.THIN:
            h = flat @ a.T
        if change.inner is not None:
            inner = change.inner.reshape(-1, change.inner.shape[-1]).to(dtype)
        if h is not None and not (done and i == 0):
            _add_product(rows, h if inner is None else h * inner, b.T)
        of_changes.append(_OfChange(b, inner, change.column, mask, base, h))
    if layer.magnitude is not None:
        assert gain is not None
        before = y
        if _tells(layer, dtype):
            scale_(rows, gain)
        else:
            y = y * gain if bias is None else torch.addcmul(bias, y, gain)
    return y, _OfLayer(layer.weight, gain, inverse, before), of_changes


def _early(layer: Layer, x: Tensor, hs: Sequence[Tensor | None]) -> bool:
    """Whether the first change is written before the product with the matrix is added (faster on a GPU)."""
    return x.is_cuda and layer.product is None and hs[0] is not None and layer.changes[0].inner is None


def _base(
    layer: Layer,
    x: Tensor,
    flat: Tensor,
    matrix: Tensor | None,
    bias: Tensor | None,
    bs: Sequence[Tensor],
    hs: Sequence[Tensor | None],
) -> Tensor:
    """W x, with the bias where it is given, and with the first change where that is early."""
    if matrix is None or layer.product is not None:
        assert layer.product is not None
        y = layer.product(x).to(x.dtype).contiguous()
        return y if bias is not None or layer.bias is None else y.sub_(layer.bias.to(x.dtype))
    if layer.gain is not None or not _early(layer, x, hs):
        return F.linear(x, matrix, bias)
    h = hs[0]
    assert h is not None
    y = x.new_empty((*x.shape[:-1], matrix.shape[0]))
    rows = y.view(-1, y.shape[-1])
    torch.mm(h, bs[0].T, out=rows) if bias is None else torch.addmm(bias, h, bs[0].T, out=rows)
    _add_product(rows, flat, matrix.T)
    return y


def _product_with(layer: Layer, flat: Tensor, matrix: Tensor | None, bias: Tensor | None) -> Tensor:
    """W x (tokens, out), without the bias."""
    if matrix is not None:
        return flat @ matrix.T
    assert layer.product is not None
    y = layer.product(flat).to(flat.dtype)
    return y if bias is None else y - bias


def _merged(matrix: Tensor, bs: Sequence[Tensor], own: Sequence[Tensor]) -> Tensor:
    """W + s·B A of all changes."""
    for b, a in zip(bs, own):
        matrix = torch.addmm(matrix, b, a)
    return matrix


def _tells(layer: Layer, dtype: torch.dtype) -> bool:
    """Whether the magnitude's gradient can be read off the layer's output."""
    return layer.bias is None and remembers(dtype)


def _gain_and_inverse(layer: Layer, matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """m/‖W'‖ (out,) with its `inverse` (`ops.gain.gain_of`)."""
    assert layer.magnitude is not None
    assert layer.square is not None
    (change,) = layer.changes
    told = _tells(layer, dtype)
    return gain_of(matrix, change.A, change.B, change.scale, layer.square, layer.magnitude, dtype, told)


def _once(
    ctx: Any,
    kept: Sequence[Tensor],
    a: Tensor,
    of_layers: list[_OfLayer],
    of_changes: list[_OfChange],
    dys: Sequence[Tensor | None],
) -> Any:
    """The gradients of all inputs of the function."""
    call: _Call = ctx.call
    flat, leaves, x = None, kept, None
    if kept and call.linked:
        leaves = [t.detach().requires_grad_(n) for t, n in zip(kept, ctx.needs)]
        with torch.enable_grad():
            x = call.rebuilt(leaves)
    elif kept:
        x = call.rebuilt(kept)
    if x is not None:
        flat = x.detach().reshape(-1, x.shape[-1])
    dx, grads = _Gradients(call, ctx.needs, ctx.trains, flat, a, of_layers, of_changes).of(dys)
    shape = next((dy.shape[:-1] for dy in dys if dy is not None), None)
    if dx is None or shape is None:
        return None, *[None] * call.inputs, *grads
    dx = dx.view(*shape, dx.shape[-1])
    if not call.linked:
        return None, dx, *grads
    wanted = [t for t in leaves if t.requires_grad]
    found = iter(torch.autograd.grad(x, wanted, dx))  # type: ignore[arg-type]
    return None, *[next(found) if t.requires_grad else None for t in leaves], *grads


class _Thinned(NamedTuple):
    """The gradient of h of one change, and which change it is."""

    index: int
    place: int
    dh: Tensor


class _Gradients:
    """One backward pass: dx (T, in), where it is needed, and the gradients of the tensors of layers and changes."""

    def __init__(
        self,
        call: _Call,
        needs: Sequence[bool],
        trains: Sequence[bool],
        flat: Tensor | None,
        a: Tensor,
        of_layers: list[_OfLayer],
        of_changes: list[_OfChange],
    ) -> None:
        self.call, self.dx, self.trains, self.flat, self.a = call, any(needs), trains, flat, a
        self.of_layers, self.of_changes = of_layers, of_changes
        self.changes = [change for layer in call.layers for change in layer.changes]
        self.ranks = [change.A.shape[0] for change in self.changes]
        self.own = (a,) if len(self.ranks) == 1 else torch.split_with_sizes(a, self.ranks)
        self.hs: Sequence[Tensor | None] = [kept.h for kept in of_changes]
        self.grads: list[Tensor | None] = [None] * len(trains)

    def of(self, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Tensor | None]]:
        places = self.call.places()
        if self.flat is not None and self.call.order is not Order.DENSE and self._recomputes(places):
            h = self.flat @ self.a.T
            self.hs = (h,) if len(self.ranks) == 1 else torch.split_with_sizes(h, self.ranks, dim=1)
        wide: list[tuple[int, Tensor, Tensor, list[_Thinned]]] = []
        plain: list[_Thinned] = []
        first = 0
        for i, (layer, dy, (at, of_its_changes)) in enumerate(zip(self.call.layers, dys, places)):
            if dy is not None:
                dy = dy.reshape(-1, dy.shape[-1])
                through, dy = self._of_layer(layer, self.of_layers[i], at, dy)
                thin = self._of_changes(layer, first, of_its_changes, dy)
                wide.append((i, through, dy, [t for t in thin if self.changes[t.index].dropout]))
                plain += [t for t in thin if not self.changes[t.index].dropout]
            first += len(layer.changes)
        dx = self._through_a(plain)
        for i, through, dy, dropped in wide:
            dx = self._through_matrix(i, through, dy, dropped, dx)
        return dx, self.grads

    def _recomputes(self, places: list[tuple[int, list[int]]]) -> bool:
        trains_b = any(self.trains[at + 1] for _, of_changes in places for at in of_changes)
        return trains_b and all(h is None for h in self.hs)

    def _of_layer(self, layer: Layer, kept: _OfLayer, at: int, dy: Tensor) -> tuple[Tensor, Tensor]:
        """What of `dy` (T, out) reaches the product with the matrix, and what reaches the changes."""
        if layer.bias is not None and self.trains[at]:
            wide = torch.promote_types(dy.dtype, torch.float32)
            self.grads[at] = dy.sum(0, dtype=wide).to(layer.bias.dtype)
        if kept.gain is None:
            return dy, dy
        place, trained = (at + 1, layer.gain) if layer.magnitude is None else (at + 2, layer.magnitude)
        if not self.trains[place]:
            gained = dy * kept.gain
        else:
            assert kept.y is not None
            assert trained is not None
            wide = trained.dtype if kept.inverse is None else kept.inverse.dtype
            gained, total = scaled_and_summed(dy, kept.y.view(dy.shape), kept.gain, wide)
            self.grads[place] = (total if kept.inverse is None else total * kept.inverse).to(trained.dtype)
        return gained, dy if layer.magnitude is None else gained

    def _of_changes(self, layer: Layer, first: int, places: list[int], dy: Tensor) -> list[_Thinned]:
        """The gradients of B and inner, into `grads`; returns those of h."""
        if self.call.order is Order.DENSE:
            assert self.flat is not None
            whole = dy.T @ self.flat
            for i, (place, change) in enumerate(zip(places, layer.changes), first):
                self.grads[place] = (self.of_changes[i].b.T @ whole).to(change.A.dtype)
                self.grads[place + 1] = _unscaled(whole @ self.own[i].T, change)
            return []
        found = []
        for i, (place, change) in enumerate(zip(places, layer.changes), first):
            kept, h = self.of_changes[i], self.hs[i]
            dh = dy @ kept.b
            if self.trains[place + 1] and h is not None:
                up = h if kept.inner is None else h * kept.inner
                self.grads[place + 1] = _unscaled(_product(dy.T, up, change.B.dtype), change)
            if kept.inner is not None and change.inner is not None:
                if self.trains[place + 2] and h is not None:
                    self.grads[place + 2] = (dh * h).view(change.inner.shape).to(change.inner.dtype)
                dh = dh * kept.inner
            found.append(_Thinned(i, place, dh))
        return found

    def _through_a(self, thin: list[_Thinned]) -> Tensor | None:
        """What comes through A of changes without dropout, at once: the part of dx, where that is asked for and the
        layers' matrices have it not in them, and the gradients of A, into `grads`.
        """
        if not thin:
            return None
        dh = thin[0].dh if len(thin) == 1 else torch.cat([t.dh for t in thin], dim=1)
        if self.flat is not None and any(self.trains[t.place] for t in thin):
            found = _product(dh.T, self.flat, self.changes[0].A.dtype)
            pieces = (found,) if len(thin) == 1 else torch.split_with_sizes(found, [self.ranks[t.index] for t in thin])
            for t, piece in zip(thin, pieces):
                if self.trains[t.place]:
                    self.grads[t.place] = piece.to(self.changes[t.index].A.dtype)
        if not self.dx or self.call.order is not Order.THIN:
            return None
        return dh @ (self.a if len(thin) == len(self.own) else torch.cat([self.own[t.index] for t in thin]))

    def _through_matrix(
        self, i: int, through: Tensor, dy: Tensor, dropped: list[_Thinned], dx: Tensor | None
    ) -> Tensor | None:
        """dx with what comes through the matrix of layer `i` and through its dropped inputs."""
        layer, matrix, dtype = self.call.layers[i], None, through.dtype
        if self.dx:
            matrix = layer.read(self.of_layers[i].weight)
            matrix = matrix if matrix.dtype == dtype else matrix.to(dtype)
            if self.call.order is not Order.THIN:
                first = sum(len(before.changes) for before in self.call.layers[:i])
                span = range(first, first + len(layer.changes))
                matrix = _merged(matrix, [self.of_changes[j].b for j in span], [self.own[j] for j in span])
            dx = through @ matrix if dx is None else _add_product(dx, through, matrix)
        for t in dropped:
            kept, change = self.of_changes[t.index], self.changes[t.index]
            assert kept.mask is not None
            if kept.base is not None and change.column is not None and self.trains[t.place + 3]:
                self.grads[t.place + 3] = (dy * kept.base).sum(0, dtype=change.column.dtype)
            if dx is not None:
                back = t.dh @ self.own[t.index]
                if kept.column is not None:
                    assert matrix is not None
                    _add_product(back, dy * kept.column.to(dtype), matrix)
                masked(back, kept.mask, change.dropout, into=dx)
            if self.flat is not None and self.trains[t.place]:
                seen = masked(self.flat, kept.mask, change.dropout)
                self.grads[t.place] = _product(t.dh.T, seen, change.A.dtype)
        return dx


def _unscaled(found: Tensor, change: Change) -> Tensor:
    """The gradient of B from that of s·B."""
    found = found if found.dtype == change.B.dtype else found.to(change.B.dtype)
    return found if change.scale == 1 else found.mul_(change.scale)


def _twice(
    ctx: Any,
    kept: Sequence[Tensor],
    of_layers: list[_OfLayer],
    of_changes: list[_OfChange],
    dys: Sequence[Tensor | None],
) -> Any:
    """The same gradients by differentiable operations, for derivatives of higher order."""
    call: _Call = ctx.call
    with torch.enable_grad():
        x = call.rebuilt(kept) if kept else None
        if x is None or (any(ctx.needs) and not x.requires_grad):
            raise RuntimeError(
                "derivatives of higher order need the layer's input, which a frozen A and autocast let go: "
                "set `model.rankloom.selector.fused = False` for them"
            )
        inputs, ys, masks = kept if call.linked else (x,), [], iter(of_change.mask for of_change in of_changes)
        asked: list[Tensor | None] = [*inputs]
        for layer, of_layer in zip(call.layers, of_layers):
            ys.append(_plainly(x, layer, of_layer.weight, [next(masks) for _ in layer.changes]))
            asked += layer.bias, layer.gain, layer.magnitude
            for change in layer.changes:
                asked += change.A, change.B, change.inner, change.column
        given = [(y, dy) for y, dy in zip(ys, dys) if dy is not None]
        needs = (*ctx.needs, *ctx.trains)
        wanted = [t for t, need in zip(asked, needs) if need and t is not None]
        outputs, into = [y for y, _ in given], [dy for _, dy in given]
        found = iter(torch.autograd.grad(outputs, wanted, into, create_graph=True, allow_unused=True))
    return None, *[next(found) if need else None for need in needs]


def _plainly(x: Tensor, layer: Layer, weight: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """The output of one layer, without anything in place."""
    matrix, flat = layer.read(weight), x.reshape(-1, x.shape[-1])
    y = F.linear(x, matrix.to(x.dtype))
    y = y if layer.gain is None else y * layer.gain.to(x.dtype)
    for change, mask in zip(layer.changes, masks):
        told = None if mask is None else masked(torch.ones_like(flat), mask, change.dropout).view(x.shape)
        dropped = x if told is None else x * told
        h = dropped @ change.A.to(x.dtype).T
        h = h if change.inner is None else h * change.inner.to(x.dtype)
        y = y + h @ (change.B * change.scale).to(x.dtype).T
        if change.column is not None:
            y = y + F.linear(dropped, matrix.to(x.dtype)) * change.column.to(x.dtype)
    if layer.magnitude is not None:
        (change,) = layer.changes
        norms = row_norms(matrix, change.A.detach(), change.B.detach(), change.scale, layer.square)
        y = y * by_norms(layer.magnitude, norms, x.dtype, gained=False)[0]
    return y if layer.bias is None else y + layer.bias.to(x.dtype)


def _add_product(into: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """into += a b (torch's counter of operations counts no `addmm_`)."""
    return torch.addmm(into, a, b, out=into)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`; on a GPU 16-bit factors are summed up in it and not rounded between."""
    if a.is_cuda and dtype is torch.float32 and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=dtype)
    found = a @ b
    return found if found.dtype == dtype else found.to(dtype)
