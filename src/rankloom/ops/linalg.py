"""Low-rank linear algebra that never builds the product."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float, square: Tensor | None = None) -> Tensor:
    """‖W + s·B A‖ by rows, shape (…, out), in float32 at least; W (…, out, in), A (…, r, in), B (…, out, r).

    `square`: ‖W‖² by rows where it is known.

    ‖w + s·bA‖² = ‖w‖² + 2s·⟨wAᵀ + s/2·b(AAᵀ), b⟩: O(out·in·r) operations, O(out·r) memory; at least 0 against
    cancellation, with gradient 0 there.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, a, b = weight.to(dtype), a.to(dtype), b.to(dtype)
    square = weight.square().sum(-1) if square is None else square
    change = torch.add(weight @ a.mT, b @ (a @ a.mT), alpha=scaling / 2)
    total = torch.add(square, (change * b).sum(-1), alpha=2 * scaling)
    if not total.requires_grad:
        return total.clamp_min_(0).sqrt_()
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).sqrt(), 0.0)


@torch.no_grad()
def largest(tensor: Tensor) -> float:
    """The largest size of any value of a floating-point tensor: NaN or infinite where one is, 0 for none."""
    if not tensor.numel():
        return 0.0
    return float(torch.stack(torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())).abs().amax())


@torch.no_grad()
def largest_norm(tensors: Iterable[Tensor]) -> float:
    """The largest Euclidean norm of any floating-point tensor, so no value is larger: NaN or infinite where one is, or
    where squares overflow; 0 for none. Asked of all at once.
    """
    kinds: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        wide = tensor if tensor.element_size() > 1 else tensor.float()
        kinds[wide.device, wide.dtype].append(wide)
    sizes = []
    for (_, dtype), group in kinds.items():
        norms = torch._foreach_norm(group, 2, dtype=torch.promote_types(dtype, torch.float32))
        sizes.append(float(torch.stack(norms).amax()))
    return next((size for size in sizes if math.isnan(size)), max(sizes, default=0.0))


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (…, out, rank), S (…, rank), Vh (…, rank, in) of the largest singular values, in float32 at least."""
    u, s, vh = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
    return u[..., :, :rank], s[..., :rank], vh[..., :rank, :]


def product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of B A for B (…, out, R) and A (…, R, in) of thin R: U (…, out, n), S (…, n), Vh (…, n, in), n ≤ R.

    B = Q₁R₁, Aᵀ = Q₂R₂, and the SVD of R₁R₂ᵀ: O((out + in)R²) operations, nothing of out·in; in float32 at least.
    """
    dtype = torch.promote_types(b.dtype, torch.float32)
    left, r1 = torch.linalg.qr(b.to(dtype))
    right, r2 = torch.linalg.qr(a.to(dtype).mT)
    u, s, vh = torch.linalg.svd(r1 @ r2.mT, full_matrices=False)
    return left @ u, s, vh @ right.mT


def product_norm(b: Tensor, a: Tensor) -> Tensor:
    """‖B A‖_F (…) for thin factors, as ‖R₁R₂ᵀ‖_F: no cancellation where the product is small, the factors are not."""
    dtype = torch.promote_types(b.dtype, torch.float32)
    r1, r2 = (torch.linalg.qr(t.to(dtype), mode="r")[1] for t in (b, a.mT))
    norm: Tensor = torch.linalg.matrix_norm(r1 @ r2.mT)
    return norm


def orthonormal_rows(shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random (…, r, n) with orthonormal rows (r ≤ n), from the QR of a Gaussian; rows repeat blocks when r > n."""
    *lead, r, n = shape
    draw = partial(torch.randn, dtype=torch.promote_types(dtype, torch.float32), device=device)
    made = [torch.linalg.qr(draw(*lead, n, min(n, r - i)))[0].mT for i in range(0, r, n)]
    return torch.cat(made, dim=-2).to(dtype)
