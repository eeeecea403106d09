"""The thin form: what most adapters say, Δy = outer ∘ B(inner ∘ A drop(x))·s + bias, written once and derived from.

An adapter that gives its thin form defines its forward, its matrix, its row norms, fusing, mixed batches, merging and
its export as LoRA with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.core.base import Base
from rankloom.ops.autocast import autocasts
from rankloom.ops.linalg import row_norms


class Thin(NamedTuple):
    """A change in thin form: ΔW = scale · diag(outer) B diag(inner) A, Δb = bias.

    A (…, R, in), B (…, out, R); `inner` (…, R), or by token (batch, tokens, R) at a linear layer; `outer` (…, out);
    `bias` (out,); `dropout` of the input of A as it acts now, 0 in evaluation. With a `magnitude` m (…, out) the rows
    of W + ΔW have these lengths (DoRA): the change is g ∘ (W + ΔW) − W, its bias g ∘ Δb, g = m/‖W + ΔW‖ by rows with
    a constant norm, and the dropout acts on the input of W in it too.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    inner: Tensor | None = None
    outer: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    dropout: float = 0.0

    @property
    def by_token(self) -> bool:
        """True where `inner` depends on the token: there is no single matrix."""
        return self.inner is not None and self.inner.shape[:-1] != self.A.shape[:-2]


def change(thin: Thin, x: Any, y: Tensor, base: Base) -> Tensor:
    """Δy for input `x` and base output `y`."""
    x = dropped(x, y, thin.dropout)
    h = base.down(x, thin.A.to(y.dtype))
    if thin.inner is not None:
        h = base.scale(h, thin.inner.to(y.dtype))
    out = base.up(h, thin.B.to(y.dtype) if thin.scale == 1 else thin.B.to(y.dtype) * thin.scale)
    if thin.outer is not None:
        out = base.scale(out, thin.outer.to(y.dtype))
    if thin.bias is not None:
        out = out + base.shift(y, thin.bias.to(y.dtype))
    if thin.magnitude is None:
        return out
    factor = gains(thin, base).to(y.dtype)
    plain = base.apply(x, base.matrix().to(y.dtype)) if thin.dropout else base.unbiased(y)
    return base.scale(plain, factor - 1) + base.scale(out, factor)


def matrix(thin: Thin, base: Base) -> Tensor:
    """ΔW (…, out, in)."""
    a, b = factors(thin)
    found = (thin.scale * b) @ a
    if thin.magnitude is None:
        return found
    own = base.matrix().to(thin.magnitude.dtype)
    return gains(thin, base)[..., None] * (own + found) - own


def shift(thin: Thin, base: Base) -> Tensor | None:
    """Δb (out,), or None."""
    if thin.bias is None or thin.magnitude is None:
        return thin.bias
    return gains(thin, base) * thin.bias


def norms(thin: Thin, base: Base) -> Tensor:
    """‖W + ΔW‖ by rows (…, out)."""
    if thin.magnitude is not None:
        return thin.magnitude.abs()
    a, b = factors(thin)
    return row_norms(base.matrix(), a, b, thin.scale)


def factors(thin: Thin) -> tuple[Tensor, Tensor]:
    """A (…, R, in) with `inner` in it and B (…, out, R) with `outer` in it; the scale is left out."""
    a = thin.A if thin.inner is None else thin.inner.to(thin.A)[..., None] * thin.A
    b = thin.B if thin.outer is None else thin.outer.to(thin.B)[..., None] * thin.B
    return a, b


def folded(thin: Thin) -> Thin:
    """The same change with `outer` in B, and `inner` too unless it goes by token."""
    if thin.inner is None and thin.outer is None:
        return thin
    if thin.by_token:
        b = thin.B if thin.outer is None else thin.outer[..., None] * thin.B
        return thin._replace(B=b, outer=None)
    b = thin.B if thin.inner is None else thin.B * thin.inner[..., None, :]
    b = b if thin.outer is None else thin.outer[..., None] * b
    return thin._replace(B=b, inner=None, outer=None)


def ungained(thin: Thin, own: Tensor) -> Thin:
    """The change without its magnitude, whose gains `own` (out,) are in B and in the bias; with (own − 1) ∘ (W x),
    which is left out, it is the same.
    """
    bias = None if thin.bias is None else own * thin.bias
    return thin._replace(B=own[..., None] * thin.B, bias=bias, magnitude=None)


def gain(magnitude: Tensor, lengths: Tensor) -> Tensor:
    """magnitude / lengths, and 1 where a length is zero."""
    living = lengths > 0
    return torch.where(living, magnitude / torch.where(living, lengths, 1.0), 1.0)


def gains(thin: Thin, base: Base, square: Tensor | None = None) -> Tensor:
    """g = m/‖W + ΔW‖ (…, out) by rows, the norm a constant; `square`: ‖W‖² by rows where it is known."""
    assert thin.magnitude is not None
    with torch.no_grad():
        a, b = factors(thin)
        lengths = row_norms(base.matrix(), a, b, thin.scale, square).to(thin.magnitude.dtype)
    return gain(thin.magnitude, lengths)


def joined(parts: Sequence[tuple[Thin, float]]) -> Thin | None:
    """The sum of changes with their weights as one thin form; None where they drop out or have magnitudes."""
    if any(thin.dropout or thin.magnitude is not None for thin, _ in parts):
        return None
    if len(parts) == 1:
        thin, weight = parts[0]
        bias = thin.bias if thin.bias is None or weight == 1 else weight * thin.bias
        return thin._replace(scale=weight * thin.scale, bias=bias)
    a = torch.cat([thin.A for thin, _ in parts], dim=-2)
    ups = [thin.B if thin.outer is None else thin.outer[..., None] * thin.B for thin, _ in parts]
    b = torch.cat([up * (weight * thin.scale) for up, (thin, weight) in zip(ups, parts)], dim=-1)
    biases = [weight * thin.bias for thin, weight in parts if thin.bias is not None]
    return Thin(a, b, inner=_inner(parts), bias=torch.stack(biases).sum(0) if biases else None)


def _inner(parts: Sequence[tuple[Thin, float]]) -> Tensor | None:
    if all(thin.inner is None for thin, _ in parts):
        return None
    each = [thin.A.new_ones(thin.A.shape[:-1]) if thin.inner is None else thin.inner for thin, _ in parts]
    lead = torch.broadcast_tensors(*(inner[..., 0] for inner in each))[0].shape  # type: ignore[no-untyped-call]
    return torch.cat([inner.expand(*lead, inner.shape[-1]) for inner in each], dim=-1)


def dropped(x: Any, y: Tensor, p: float) -> Any:
    """The input of a change: in the output's dtype, dropped out. Token ids and no input pass through."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    if not autocasts(x):
        x = x.to(y.dtype)
    return F.dropout(x, p, training=True) if p else x
