"""Linear layers that read the same input, and their thin changes, as one autograd function.

y = G ∘ (W x) + b + Σ_c (s_c·B_c (e_c ∘ A_c d_c(x)) + v_c ∘ (W d_c(x))) for each layer, with d_c the dropout of a
change, e_c by token, G and v_c (out,); for DoRA without dropout y = g ∘ (W x + s·B A x) + b with the gain
g = m/‖W + s·B A‖ by rows (the norm is a constant). One thin product for all A, sums in place, and nothing kept but
h = d(x) Aᵀ, one bit of dropout an element or its seed, and x where an A is trained: rebuilt in backward where its
origin is known. Where the tokens and ranks are so many that it is cheaper, W + s·B A is made for the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    """One layer: its frozen matrix (out, in) is `weight` or `read(weight)`, unpacked only for the product; bias (out,);
    `gain` (out,) of the product with the matrix alone, or `magnitude` and ‖W‖² by rows, `square` (out,), of a DoRA that
    is the only change; `product`: the layer's own x ↦ W x + b, where it has kernels or rounding of its own.
    """

    weight: Tensor
    read: Callable[[Tensor], Tensor] | None
    bias: Tensor | None
    changes: Sequence[Change]
    gain: Tensor | None = None
    magnitude: Tensor | None = None
    square: Tensor | None = None
    product: Callable[[Tensor], Tensor] | None = None


OF_LAYER, OF_CHANGE = 3, 4
"""Tensors that may train: bias, gain, magnitude of a layer; A, B, inner, column of a change."""
KEPT_OF_LAYER, KEPT_OF_CHANGE = 4, 6
"""Tensors that backward gets: weight, gain, inverse, y of a layer, where y times the gradient of the output, summed up
(and times `inverse`), is that of the gain (the magnitude); of a change s·B in the dtype of the products, inner, column,
what tells the dropout's mask, W d(x), h.
"""


def fused(x: Tensor, layers: Sequence[Layer], origin: Origin | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The outputs (…, out) of `layers` for x (…, in), computed in `dtype`; `origin` tells how backward rebuilds x."""
    linked = origin is not None and origin.shortcut
    inputs = origin.kept if origin is not None and linked else (x,)
    trains, trained = list[bool](), list[Tensor]()
    for layer in layers:
        for t in _tensors(layer):
            trains.append(t is not None and t.requires_grad)
            if t is not None and trains[-1]:
                trained.append(t)
    kept, make = (None, None) if origin is None else (origin.kept, origin.make)
    call = _Call(layers, trains, dtype, len(inputs), linked, make, _Input(x, kept))
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _Fused.apply(call, *inputs, *trained)  # type: ignore[no-untyped-call, no-any-return]
    return _Fused.apply(call, *inputs, *trained)  # type: ignore[no-untyped-call, no-any-return]


def _tensors(layer: Layer) -> list[Tensor | None]:
    """Those that may train, in the order in which they are counted."""
    found = [layer.bias, layer.gain, layer.magnitude]
    for change in layer.changes:
        found += change.A, change.B, change.inner, change.column
    return found


class _Input(NamedTuple):
    """What forward takes: the input, and what it is rebuilt from if not from itself."""

    x: Tensor
    kept: tuple[Tensor, ...] | None


@dataclass(slots=True)
class _Call:
    """What one call knows beside its tensors: which of `_tensors` train; `make` rebuilds x, which is `linked` to what
    it is made from, past x.

    Forward takes `given` out and chooses the order.
    """

    layers: Sequence[Layer]
    trains: list[bool]
    dtype: torch.dtype
    inputs: int
    linked: bool
    make: Callable[[tuple[Tensor, ...]], Tensor] | None
    given: _Input | None
    order: Order = Order.THIN
    told: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    """Outputs that backward reads, by layer, with their versions: what follows may change them in place."""

    def rebuilt(self, kept: Sequence[Tensor]) -> Tensor:
        x = kept[0] if self.make is None else self.make(tuple(kept))
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def matrix(self, layer: Layer, weight: Tensor) -> Tensor:
        """The layer's frozen matrix in the dtype of the products."""
        matrix = weight if layer.read is None else layer.read(weight)
        return matrix if matrix.dtype == self.dtype else matrix.to(self.dtype)

    def span(self, i: int) -> tuple[int, int]:
        """The first and last of the changes of layer `i` among those of all."""
        first = sum(len(before.changes) for before in self.layers[:i])
        return first, first + len(self.layers[i].changes)

    def split(self, stacked: Tensor, dim: int = 0) -> Sequence[Tensor]:
        """The parts of what is stacked by the ranks of all changes."""
        ranks = list[int]()
        for layer in self.layers:
            for change in layer.changes:
                ranks += (change.A.shape[0],)
        return (stacked,) if len(ranks) == 1 else torch.split_with_sizes(stacked, ranks, dim=dim)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert call.given is not None
        (x, origins), call.given = call.given, None
        dtype, trains = call.dtype, call.trains
        x = x if x.dtype == dtype else x.to(dtype)
        flat, needs = x.reshape(-1, x.shape[-1]), ctx.needs_input_grad[1 : 1 + call.inputs]
        each, train_a, train_b, all_train, at = list[Tensor](), False, False, True, 0
        drops = by_token = lengths = False
        for layer in call.layers:
            at, lengths = at + OF_LAYER, lengths or layer.magnitude is not None
            for change in layer.changes:
                each.append(change.A)
                train_a, train_b = train_a or trains[at], train_b or trains[at + 1]
                all_train = all_train and trains[at] and trains[at + 1]
                drops, by_token = drops or change.dropout > 0, by_token or change.inner is not None
                at += OF_CHANGE
        a = each[0] if len(each) == 1 else torch.cat(each)
        a = a if a.dtype == dtype else a.to(dtype)
        call.order = _order(call, flat, True in needs) if all_train and not (drops or by_token) else Order.THIN
        own, hs = call.split(a), None
        if call.order is Order.THIN and not drops:
            hs = call.split(flat @ a.T, dim=1)
        kept: tuple[Tensor, ...] = ()
        if (call.linked and True in needs) or train_a:
            kept = (tensors[0] if tensors[0].dtype == dtype else x,) if origins is None else origins
        rebuilds = lengths and len(kept) > 0 and not drops
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        ys, of_layers, of_changes, first = list[Tensor](), list[Tensor | None](), list[Tensor | None](), 0
        for layer in call.layers:
            last = first + len(layer.changes)
            y, kept_of_layer, kept_of_changes = _output(
                call, layer, x, flat, own[first:last], None if hs is None else hs[first:last]
            )
            if kept_of_layer[-1] is y and len(kept) > 0 and not hooked:
                call.told[len(ys)] = y.detach(), y._version
                kept_of_layer = (*kept_of_layer[:-1], None)
            # torch allows nothing in place on an output that is a view
            ys.append(torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y)
            of_layers += kept_of_layer
            of_changes += kept_of_changes
            first = last
        if not by_token and (rebuilds or not train_b):
            of_changes[KEPT_OF_CHANGE - 1 :: KEPT_OF_CHANGE] = [None] * len(each)
        ctx.call, ctx.count, ctx.needs = call, len(kept), needs
        ctx.aside = [y for y, _ in call.told.values()]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, a, *of_layers, *of_changes)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> Any:
        saved, call = ctx.saved_tensors, ctx.call
        kept, rest = saved[: ctx.count], saved[ctx.count :]
        of_changes = rest[1 + KEPT_OF_LAYER * len(call.layers) :]
        if torch.is_grad_enabled():
            return _twice(call, ctx.needs, kept, rest, of_changes, dys)
        return _once(call, ctx.needs, kept, rest, of_changes, dys)


def _scaled(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """s·B in `dtype`, rounded once."""
    if scale == 1:
        return b.to(dtype)
    return b * scale if b.dtype == dtype else torch.mul(b, scale, out=torch.empty_like(b, dtype=dtype))


def _order(call: _Call, flat: Tensor, dx: bool) -> Order:
    """The cheapest order where all factors train (a frozen one takes x or products off) and all changes see x as it is;
    the thin one where a sum with W would lose small changes (16 bits), or W has a product or a gain of its own.
    """
    if call.dtype not in (torch.float32, torch.float64):
        return Order.THIN
    shapes = list[tuple[tuple[int, int], int]]()
    for layer in call.layers:
        if layer.product is not None or layer.gain is not None:
            return Order.THIN
        for change in layer.changes:
            shapes += (((change.B.shape[0], change.A.shape[1]), change.A.shape[0]),)
    return cheapest(flat.shape[0], tuple(shapes), dx)


def _output(
    call: _Call, layer: Layer, x: Tensor, flat: Tensor, own: Sequence[Tensor], hs: Sequence[Tensor] | None
) -> tuple[Tensor, tuple[Tensor | None, ...], list[Tensor | None]]:
    """The output (…, out) of one layer, and what backward needs of it and of its changes; `own`: their A; `hs`: x Aᵀ
    where it is known already.
    """
    dtype, changes, bs = call.dtype, layer.changes, list[Tensor]()
    for change in changes:
        bs.append(_scaled(change.B, change.scale, dtype))
    bias = layer.bias if layer.bias is None or layer.bias.dtype == dtype else layer.bias.to(dtype)
    matrix = gain = inverse = before = None
    if layer.product is None or layer.magnitude is not None:
        matrix = layer.weight if layer.read is None else layer.read(layer.weight)
        if layer.magnitude is not None:
            gain, inverse = _gain_and_inverse(layer, matrix, dtype)
        matrix = matrix if matrix.dtype == dtype else matrix.to(dtype)
        matrix = matrix if call.order is Order.THIN else _merged(matrix, bs, own)
    # on a GPU the first change is written before the product with the matrix is added to it
    early = None if hs is None or not x.is_cuda or changes[0].inner is not None else hs[0]
    early = early if layer.product is None and layer.gain is None else None
    late = layer.gain is not None or layer.magnitude is not None
    y = _base(layer, x, flat, matrix, None if late else bias, early, bs[0])
    if layer.gain is not None:
        gain, before = layer.gain.to(dtype), y
        y = y * gain if bias is None else torch.addcmul(bias, y, gain)
    rows, kept = y.view(-1, y.shape[-1]), list[Tensor | None]()
    for i, (change, a, b) in enumerate(zip(changes, own, bs)):
        h = inner = mask = base = None
        if change.dropout:
            dropped, mask = drop(flat, change.dropout)
            h = dropped @ a.T
            if change.column is not None:
                base = _unbiased(layer, dropped, matrix)
                rows.addcmul_(base, change.column.to(dtype))
        elif call.order is Order.THIN:
            h = flat @ a.T if hs is None else hs[i]
        if change.inner is not None:
            inner = change.inner.reshape(-1, change.inner.shape[-1]).to(dtype)
        if h is not None and (i > 0 or early is None):
            _add_product(rows, h if inner is None else h * inner, b.T)
        kept += b, inner, change.column, mask, base, h
    if layer.magnitude is not None:
        assert gain is not None
        before = y
        if _tells(layer, dtype):
            scale_(rows, gain)
        else:
            y = y * gain if bias is None else torch.addcmul(bias, y, gain)
    return y, (layer.weight, gain, inverse, before), kept


def _base(
    layer: Layer, x: Tensor, flat: Tensor, matrix: Tensor | None, bias: Tensor | None, h: Tensor | None, b: Tensor
) -> Tensor:
    """W x, plus the bias where it is given, and h bᵀ where that is."""
    if layer.product is not None:
        y = layer.product(x).to(x.dtype).contiguous()
        return y if bias is not None or layer.bias is None else y.sub_(layer.bias.to(x.dtype))
    assert matrix is not None
    if h is None:
        return F.linear(x, matrix, bias)
    y = x.new_empty((*x.shape[:-1], matrix.shape[0]))
    rows = y.view(-1, y.shape[-1])
    torch.mm(h, b.T, out=rows) if bias is None else torch.addmm(bias, h, b.T, out=rows)
    _add_product(rows, flat, matrix.T)
    return y


def _unbiased(layer: Layer, flat: Tensor, matrix: Tensor | None) -> Tensor:
    """W x (tokens, out)."""
    if layer.product is None and matrix is not None:
        return flat @ matrix.T
    assert layer.product is not None
    y = layer.product(flat).to(flat.dtype)
    return y if layer.bias is None else y - layer.bias.to(flat.dtype)


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
    call: _Call,
    needs: Sequence[bool],
    kept: Sequence[Tensor],
    rest: Sequence[Any],
    of_changes: Sequence[Any],
    dys: Sequence[Tensor | None],
) -> Any:
    """The gradients of all inputs of the function."""
    flat, leaves, x = None, list[Tensor](), None
    if kept and call.linked:
        for t, need in zip(kept, needs):
            leaves.append(t.detach().requires_grad_(need))
        with torch.enable_grad():
            x = call.rebuilt(leaves)
    elif kept:
        x = call.rebuilt(kept)
    if x is not None:
        flat = x.detach().reshape(-1, x.shape[-1])
    pass_ = _Backward(call, True in needs, flat, rest, of_changes)
    dx, grads = pass_.dx(dys), list[Tensor | None]()
    for trains, grad in zip(call.trains, pass_.grads):
        if trains:
            grads.append(grad)
    if dx is None:
        return None, *[None] * call.inputs, *grads
    lead = next(dy.shape[:-1] for dy in dys if dy is not None)
    dx = dx.view(*lead, dx.shape[-1])
    if not call.linked:
        return None, dx, *grads
    found = iter(torch.autograd.grad(x, [t for t in leaves if t.requires_grad], dx))  # type: ignore[arg-type]
    return None, *[next(found) if t.requires_grad else None for t in leaves], *grads


_Thinned = tuple[int, int, Change, Tensor]
"""A change by its number, the place of its tensors, itself, and the gradient of its h."""


class _Backward:
    """One backward pass: dx (T, in), where it is needed, and `grads` of the tensors of layers and changes."""

    def __init__(
        self, call: _Call, needs_x: bool, flat: Tensor | None, rest: Sequence[Any], of_changes: Sequence[Any]
    ) -> None:
        self.call, self.needs_x, self.flat, self.a, self.trains = call, needs_x, flat, rest[0], call.trains
        self.of_layers, self.of_changes = rest[1:], of_changes
        self.own = call.split(self.a)
        self.grads: list[Tensor | None] = [None] * len(call.trains)
        self.hs: Sequence[Tensor | None] = of_changes[KEPT_OF_CHANGE - 1 :: KEPT_OF_CHANGE]
        if flat is not None and call.order is not Order.DENSE and self.hs.count(None) == len(self.hs):
            self.hs = call.split(flat @ self.a.T, dim=1)

    def dx(self, dys: Sequence[Tensor | None]) -> Tensor | None:
        """The gradient of x; those of all else in `grads`."""
        wide, plain = list[tuple[int, Tensor, Tensor, list[_Thinned]]](), list[_Thinned]()
        number = at = 0
        for i, (layer, dy) in enumerate(zip(self.call.layers, dys)):
            if dy is not None:
                dy = dy.reshape(-1, dy.shape[-1])
                through, dy = self._of_layer(i, layer, at, dy)
                dropped: list[_Thinned] = []
                wide.append((i, through, dy, dropped))
                if self.call.order is Order.DENSE:
                    self._by_whole(layer, number, at + OF_LAYER, dy)
                else:
                    self._of_changes(layer, number, at + OF_LAYER, dy, plain, dropped)
            number, at = number + len(layer.changes), at + OF_LAYER + OF_CHANGE * len(layer.changes)
        dx = self._through_a(plain)
        for i, through, dy, dropped in wide:
            if self.needs_x or dropped:
                dx = self._through_matrix(i, through, dy, dropped, dx)
        return dx

    def _of_layer(self, i: int, layer: Layer, at: int, dy: Tensor) -> tuple[Tensor, Tensor]:
        """What of `dy` (T, out) reaches the product with the matrix, and what reaches the changes."""
        if layer.bias is not None and self.trains[at]:
            wide = torch.promote_types(dy.dtype, torch.float32)
            self.grads[at] = dy.sum(0, dtype=wide).to(layer.bias.dtype)
        _, gain, inverse, y = self.of_layers[KEPT_OF_LAYER * i : KEPT_OF_LAYER * (i + 1)]
        if gain is None:
            return dy, dy
        place, trained = (at + 1, layer.gain) if layer.magnitude is None else (at + 2, layer.magnitude)
        if not self.trains[place]:
            gained = dy * gain
        else:
            assert trained is not None
            gain = gain if gain.dtype == dy.dtype else gain.to(dy.dtype)
            wide = torch.promote_types(dy.dtype, torch.float32) if inverse is None else inverse.dtype
            y = self._told(i, layer, gain) if y is None else y.view(dy.shape)
            gained, total = scaled_and_summed(dy, y, gain, wide)
            self.grads[place] = (total if inverse is None else total * inverse).to(trained.dtype)
        return gained, dy if layer.magnitude is None else gained

    def _told(self, i: int, layer: Layer, gain: Tensor) -> Tensor:
        """The output (T, out) of layer `i`; made anew where it was changed in place after forward."""
        y, version = self.call.told[i]
        if y._version == version:
            return y.view(-1, y.shape[-1])
        assert self.flat is not None
        h, (at, _) = self.flat @ self.a.T, self.call.span(i)
        b, weight = self.of_changes[KEPT_OF_CHANGE * at], self.of_layers[KEPT_OF_LAYER * i]
        own = self.call.split(h, dim=1)[at]
        return _unbiased(layer, self.flat, self.call.matrix(layer, weight)).addmm_(own, b.T).mul_(gain)

    def _by_whole(self, layer: Layer, number: int, at: int, dy: Tensor) -> None:
        """The gradients of the factors out of the whole matrix's."""
        assert self.flat is not None
        whole = dy.T @ self.flat
        for i, change in enumerate(layer.changes, number):
            self.grads[at] = (self.of_changes[KEPT_OF_CHANGE * i].T @ whole).to(change.A.dtype)
            self.grads[at + 1] = _unscaled(whole @ self.own[i].T, change)
            at += OF_CHANGE

    def _of_changes(
        self, layer: Layer, number: int, at: int, dy: Tensor, plain: list[_Thinned], dropped: list[_Thinned]
    ) -> None:
        """The gradients of B and inner; those of h go to `plain`, or where its input was dropped out to `dropped`."""
        for i, change in enumerate(layer.changes, number):
            b, inner, h = self.of_changes[KEPT_OF_CHANGE * i], self.of_changes[KEPT_OF_CHANGE * i + 1], self.hs[i]
            dh = dy @ b
            if self.trains[at + 1] and h is not None:
                up = h if inner is None else h * inner
                self.grads[at + 1] = _unscaled(_product(dy.T, up, change.B.dtype), change)
            if inner is not None and change.inner is not None:
                if self.trains[at + 2] and h is not None:
                    self.grads[at + 2] = (dh * h).view(change.inner.shape).to(change.inner.dtype)
                dh = dh * inner
            (dropped if change.dropout else plain).append((i, at, change, dh))
            at += OF_CHANGE

    def _through_a(self, thin: list[_Thinned]) -> Tensor | None:
        """What comes through A of changes without dropout, at once: the part of dx, where that is asked for and the
        layers' matrices have it not in them, and the gradients of A.
        """
        if not thin:
            return None
        parts, own, train_a = list[Tensor](), list[Tensor](), False
        for i, at, _, part in thin:
            parts.append(part)
            own.append(self.own[i])
            train_a = train_a or self.trains[at]
        dh = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.flat is not None and train_a:
            found, row = _product(dh.T, self.flat, thin[0][2].A.dtype), 0
            for (_, at, change, _), part in zip(thin, own):
                if self.trains[at]:
                    piece = found[row : row + part.shape[0]]
                    self.grads[at] = piece if piece.dtype == change.A.dtype else piece.to(change.A.dtype)
                row += part.shape[0]
        if not self.needs_x or self.call.order is not Order.THIN:
            return None
        return dh @ (self.a if len(own) == len(self.own) else torch.cat(own))

    def _through_matrix(
        self, i: int, through: Tensor, dy: Tensor, dropped: list[_Thinned], dx: Tensor | None
    ) -> Tensor | None:
        """dx with what comes through the matrix of layer `i`, and through its dropped inputs with their gradients."""
        layer, matrix, dtype = self.call.layers[i], self.of_layers[KEPT_OF_LAYER * i], through.dtype
        if self.needs_x:
            matrix = self.call.matrix(layer, matrix)
            if self.call.order is not Order.THIN:
                span = slice(*self.call.span(i))
                matrix = _merged(matrix, self.of_changes[::KEPT_OF_CHANGE][span], self.own[span])
            dx = through @ matrix if dx is None else _add_product(dx, through, matrix)
        for number, at, change, dh in dropped:
            _, _, column, mask, base, _ = self.of_changes[KEPT_OF_CHANGE * number : KEPT_OF_CHANGE * (number + 1)]
            if base is not None and self.trains[at + 3]:
                self.grads[at + 3] = (dy * base).sum(0, dtype=column.dtype)
            if dx is not None:
                back = dh @ self.own[number]
                if column is not None:
                    _add_product(back, dy * column.to(dtype), matrix)
                masked(back, mask, change.dropout, into=dx)
            if self.flat is not None and self.trains[at]:
                self.grads[at] = _product(dh.T, masked(self.flat, mask, change.dropout), change.A.dtype)
        return dx


def _unscaled(found: Tensor, change: Change) -> Tensor:
    """The gradient of B from that of s·B."""
    found = found if found.dtype == change.B.dtype else found.to(change.B.dtype)
    return found if change.scale == 1 else found.mul_(change.scale)


def _twice(
    call: _Call,
    needs: Sequence[bool],
    kept: Sequence[Tensor],
    rest: Sequence[Any],
    of_changes: Sequence[Any],
    dys: Sequence[Tensor | None],
) -> Any:
    """The same gradients by differentiable operations, for derivatives of higher order.

    By aliases of all tensors: what is asked of one may not run through another that was made from it.
    """
    with torch.enable_grad():
        inputs = [t.view_as(t) for t in kept]
        x = call.rebuilt(inputs) if kept else None
        if x is None or (any(needs) and not x.requires_grad):
            raise RuntimeError(
                "derivatives of higher order need the layer's input, which a frozen A and autocast let go: "
                "set `model.rankloom.selector.fused = False` for them"
            )
        asked: list[Tensor | None] = [*(inputs if call.linked else (x,))]
        ys, masks = list[Tensor](), iter(of_changes[3::KEPT_OF_CHANGE])
        for i, layer in enumerate(call.layers):
            layer = _aliased(layer)
            asked += _tensors(layer)
            ys.append(_plainly(x, layer, rest[1 + KEPT_OF_LAYER * i], [next(masks) for _ in layer.changes]))
        given = [(y, dy) for y, dy in zip(ys, dys) if dy is not None]
        flags = (*needs, *call.trains)
        wanted = [t for t, flag in zip(asked, flags) if flag and t is not None]
        outputs, into = [y for y, _ in given], [dy for _, dy in given]
        found = iter(torch.autograd.grad(outputs, wanted, into, create_graph=True, allow_unused=True))
    inward = [next(found) if need else None for need in needs]
    return None, *inward, *found


def _aliased(layer: Layer) -> Layer:
    """The layer with an alias of every tensor that may train."""
    bias, gain, magnitude, *each = [None if t is None else t.view_as(t) for t in _tensors(layer)]
    changes = []
    for i, change in enumerate(layer.changes):
        a, b, inner, column = each[OF_CHANGE * i : OF_CHANGE * (i + 1)]
        assert a is not None
        assert b is not None
        changes.append(change._replace(A=a, B=b, inner=inner, column=column))
    return layer._replace(bias=bias, gain=gain, magnitude=magnitude, changes=changes)


def _plainly(x: Tensor, layer: Layer, weight: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
    """The output of one layer, without anything in place."""
    matrix, flat = weight if layer.read is None else layer.read(weight), x.reshape(-1, x.shape[-1])
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
