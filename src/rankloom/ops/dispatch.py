"""Sparse mixtures: every token goes through the k experts that it chose, and through no other.

y_t = Σ_{i chosen by t} w_ti·B_i (d_i ∘ A_i x_t). The (token, expert) pairs are sorted once by expert; each expert then
works on a block of rows. Gradients are those of the dense form whose other weights are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dispatched(x: Tensor, weights: Tensor, k: int, a: Tensor, b: Tensor, inner: Tensor | None = None) -> Tensor:
    """y (…, out) for x (…, in), weights (…, n) with at most k not 0; A (n, r, in), B (n, out, r), d (n, r)."""
    flat, each = x.reshape(-1, x.shape[-1]), weights.reshape(-1, weights.shape[-1])
    values, ids = each.topk(k, dim=-1)
    order = ids.flatten().argsort(stable=True)
    tokens = order.div(k, rounding_mode="floor")
    counts = torch.bincount(ids.flatten(), minlength=each.shape[-1]).tolist()
    parts = []
    for i, rows in enumerate(torch.split(flat[tokens], counts)):
        h = rows @ a[i].mT
        parts.append((h if inner is None else h * inner[i]) @ b[i].mT)
    changes = torch.cat(parts)
    changes = changes * values.flatten()[order, None].to(changes.dtype)
    out = changes.new_zeros(flat.shape[0], b.shape[-2]).index_add(0, tokens, changes)
    return out.reshape(*x.shape[:-1], b.shape[-2])
