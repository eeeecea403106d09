"""A matrix as a quantised part and a low-rank part: W ≈ Q + s·B A.

`loftq` quantises first and corrects by SVD (LoftQ, Li et al., ICLR 2024, arXiv 2310.08659); `lq` takes the
SVD first (LQ-LoRA, Guo et al., ICLR 2024, arXiv 2311.12023); `lqer` corrects once, under the
scale of the activations (LQER, Zhang et al., ICML 2024, arXiv 2402.02446). All are computed in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from rankloom.errors import SettingsError

SVD = Literal["exact", "randomized"]
OVERSAMPLING = 10


class Keeper(Protocol):
    """What keeps a weight in fewer bits, such as a store."""

    def pack(self, weight: Tensor) -> Tensor:
        """The kept weight, of the same shape and dtype."""

    def round_trip(self, weight: Tensor) -> Tensor:
        """The plain weight that `pack` keeps."""


@dataclass(frozen=True)
class Split:
    """W ≈ q + scale·b a: q (out, in) as the keeper keeps it, in W's dtype; a (r, in), b (out, r) in float32 at least.

    `errors`: ‖W − q − scale·b a‖ of every iterate (weighted, where the split is); `best`: the iterate that this is.
    `errors[0]` is the first thing that the algorithm has: plain quantisation for `loftq` and `lqer`, one SVD and one
    quantisation for `lq`.
    """

    q: Tensor
    a: Tensor
    b: Tensor
    errors: tuple[float, ...]
    best: int

    @property
    def error(self) -> float:
        """The error of this split."""
        return self.errors[self.best]


def loftq(w: Tensor, store: Keeper | None, r: int, iters: int = 5, scale: float = 1.0, svd: SVD = "exact") -> Split:
    """Alternate Q = q(W − L R) and L R = svd_r(W − Q) `iters` times from L R = 0; the best iterate is returned.

    s·b a = L R with b = U√S/√s, a = √S Vᵀ/√s. `iters=0`: plain quantisation, zero factors; `store=None` (16 bits): W
    itself, zero factors.
    """
    wide, scale = _wide(w), _positive(scale)
    if iters < 0:
        raise SettingsError(f"iters={iters}: at least 0")
    left, right = _zeros(wide, r)
    q = _keep(wide, store)
    errors = [_norm(wide - q)]
    best = (q, left, right)
    for _ in range(iters if store is not None else 0):
        q = _keep(wide - left @ right, store)
        rest = wide - q
        left, right = low_rank(rest, r, svd)
        errors.append(_norm(rest - left @ right))
        if errors[-1] < min(errors[:-1]):
            best = (q, left, right)
    return _split(w, *best, errors, errors.index(min(errors)), scale)


def lq(
    w: Tensor,
    store: Keeper | None,
    r: int,
    fisher: Tensor | None = None,
    max_iters: int = 100,
    scale: float = 1.0,
    svd: SVD = "exact",
) -> Split:
    """Alternate L R = svd_r(W − Q) and Q = q(W − L R) from Q = 0 until the error rises; the best iterate is returned.

    `fisher` (out, in): errors are ‖√F·(W − Q − L R)‖, and the SVD is that of `low_rank` with the same weights. Where
    rows and columns say nothing about F, the unweighted split may be better under F: then that one is returned, and
    its error is the last.
    """
    wide, scale = _wide(w), _positive(scale)
    if max_iters < 1:
        raise SettingsError(f"max_iters={max_iters}: at least 1")
    best, errors = _svd_first(wide, store, r, max_iters, svd, fisher)
    if fisher is not None:
        plain, _ = _svd_first(wide, store, r, max_iters, svd, None)
        errors.append(_weighted(wide - plain[0] - plain[1] @ plain[2], fisher))
        best = plain if errors[-1] < min(errors[:-1]) else best
    return _split(w, *best, errors, errors.index(min(errors)), scale)


def _svd_first(
    wide: Tensor, store: Keeper | None, r: int, max_iters: int, svd: SVD, fisher: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], list[float]]:
    """The best (Q, L, R) and the error of every iterate."""
    q: Tensor = torch.zeros_like(wide)
    errors: list[float] = []
    best = (q, *_zeros(wide, r))
    for _ in range(max_iters):
        left, right = low_rank(wide - q, r, svd, fisher)
        q = _keep(wide - left @ right, store)
        errors.append(_weighted(wide - q - left @ right, fisher))
        if len(errors) > 1 and errors[-1] >= errors[-2]:
            break
        best = (q, left, right)
    return best, errors


def lqer(
    w: Tensor,
    store: Keeper | None,
    r: int,
    act_scale: Tensor | None = None,
    scale: float = 1.0,
    factors: Keeper | None = None,
) -> Split:
    """Quantise once and add the rank-r part of the error E = W − q(W); L²QER with `act_scale` c (in,).

    The correction minimises ‖(E − s·b a) diag(c)‖; `errors` are the plain (‖W − q‖, ‖W − q − s·b a‖). `factors`
    keeps the two factors in fewer bits too. r=0 is plain quantisation.
    """
    wide, scale = _wide(w), _positive(scale)
    q = _keep(wide, store)
    error = wide - q
    errors = [_norm(error)]
    left, right = _zeros(wide, r)
    if r:
        c = torch.ones_like(wide[0]) if act_scale is None else _act_scale(act_scale, wide)
        u, s, vh = torch.linalg.svd(error * c, full_matrices=False)
        left, right = _filled(left, right, u[:, :r] * s[:r], vh[:r] / c)
        errors.append(_norm(error - left @ right))
    made = _split(w, q, left, right, errors, len(errors) - 1, scale)
    if factors is None:
        return made
    a, b = factors.round_trip(made.a), factors.round_trip(made.b)
    errors[-1] = _norm(error - scale * b @ a)
    return Split(made.q, a, b, tuple(errors), made.best)


def low_rank(matrix: Tensor, r: int, svd: SVD = "exact", fisher: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L (out, r) = U√S and R (r, in) = √S Vᵀ of the best rank-r part; columns beyond the matrix's rank are zero.

    `fisher` (out, in), at least 0: the best part under the rank-one weights √(row mean · column mean), in closed form
    (LQ-LoRA); rows and columns without any information count a little, so that nothing is divided by zero.
    """
    matrix = _wide(matrix)
    rows = columns = None
    if fisher is not None:
        importance = _importance(fisher, matrix)
        rows, columns = _root(importance.mean(1)), _root(importance.mean(0))
        matrix = rows[:, None] * matrix * columns
    u, s, vh = _truncated(matrix, min(r, *matrix.shape), svd)
    left, right = u * s.sqrt(), s.sqrt()[:, None] * vh
    if rows is not None and columns is not None:
        left, right = left / rows[:, None], right / columns
    return _filled(*_zeros(matrix, r), left, right)


def _truncated(matrix: Tensor, r: int, svd: SVD) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vᵀ of the `r` largest singular values; "randomized": a Gaussian sketch (Halko et al., SIAM Review 2011)."""
    if svd == "exact" or min(matrix.shape) <= r + OVERSAMPLING:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :r], s[:r], vh[:r]
    generator = torch.Generator().manual_seed(0)
    sketch = torch.randn(matrix.shape[1], r + OVERSAMPLING, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :r], s[:r], vh[:r]


def _split(w: Tensor, q: Tensor, left: Tensor, right: Tensor, errors: list[float], best: int, scale: float) -> Split:
    root = scale**0.5
    return Split(q.to(w.dtype), right / root, left / root, tuple(errors), best)


def _keep(weight: Tensor, store: Keeper | None) -> Tensor:
    return weight if store is None else store.pack(weight)


def _wide(w: Tensor) -> Tensor:
    if w.ndim != 2:
        raise SettingsError(f"a tensor of shape {tuple(w.shape)} is no matrix (out, in)")
    return w.detach().to(torch.promote_types(w.dtype, torch.float32))


def _zeros(like: Tensor, r: int) -> tuple[Tensor, Tensor]:
    if r < 0:
        raise SettingsError(f"r={r}: a rank of at least 0")
    return like.new_zeros(like.shape[0], r), like.new_zeros(r, like.shape[1])


def _filled(left: Tensor, right: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`u` and `v` in the first columns and rows of zeros."""
    left[:, : u.shape[1]], right[: v.shape[0]] = u, v
    return left, right


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))


def _weighted(matrix: Tensor, fisher: Tensor | None) -> float:
    return _norm(matrix if fisher is None else _importance(fisher, matrix).sqrt() * matrix)


def _positive(scale: float) -> float:
    if not scale > 0:
        raise SettingsError(f"scale={scale}: the scale of the low-rank part is positive")
    return scale


def _importance(fisher: Tensor, like: Tensor) -> Tensor:
    if fisher.shape != like.shape or bool((fisher < 0).any()):
        raise SettingsError(
            f"Fisher information {tuple(fisher.shape)} for a weight {tuple(like.shape)}: same shape, at least 0"
        )
    return fisher.to(like)


def _root(mean: Tensor) -> Tensor:
    """√mean, kept away from zero; ones where there is no information at all."""
    top = mean.max()
    return (mean / top).clamp_min(1e-8).sqrt() if float(top) > 0 else torch.ones_like(mean)


def _act_scale(c: Tensor, like: Tensor) -> Tensor:
    if c.shape != like.shape[1:] or not bool((c > 0).all()):
        raise SettingsError(f"act_scale of shape {tuple(c.shape)} for a weight {tuple(like.shape)}: (in,), above 0")
    return c.to(like)
