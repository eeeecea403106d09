"""Starts of a factor pair A (…, r, in), B (…, out, r). All but `olora` and `pissa` leave the change at zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from rankloom.core.base import Base
from rankloom.errors import SettingsError, suggest
from rankloom.ops.linalg import orthonormal_rows, truncated_svd


class Factors(Protocol):
    """An adapter with a factor pair and a scale."""

    @property
    def A(self) -> Tensor:
        """(…, r, in)."""

    @property
    def B(self) -> Tensor:
        """(…, out, r)."""

    scaling: float


def kaiming(adapter: Factors, base: Base) -> None:
    """A ~ U(−1/√in, 1/√in), B = 0: what the reference code of LoRA and PEFT do. Embeddings: A = 0, B ~ N(0, 1), unless
    A is kept at its start.
    """
    if base.kind.name == "embedding" and adapter.A.requires_grad:
        adapter.A.zero_()
        adapter.B.normal_()
        return
    bound = 1 / math.sqrt(adapter.A.shape[-1])
    adapter.A.uniform_(-bound, bound)
    adapter.B.zero_()


def gaussian(adapter: Factors, base: Base) -> None:
    """A ~ N(0, 1/r²), B = 0: the paper's Gaussian start (arXiv 2106.09685 §4.1), with PEFT's deviation 1/r."""
    if base.kind.name == "embedding" and adapter.A.requires_grad:
        kaiming(adapter, base)
        return
    adapter.A.normal_(std=1 / adapter.A.shape[-2])
    adapter.B.zero_()


def orthogonal(adapter: Factors, base: Base) -> None:
    """A with orthonormal rows, B = 0."""
    adapter.A.copy_(orthonormal_rows(adapter.A.shape, adapter.A.dtype, adapter.A.device))
    adapter.B.zero_()


def svd(adapter: Factors, base: Base) -> None:
    """A = the top right singular vectors of W, B = 0."""
    _, _, vh = truncated_svd(base.matrix(), adapter.A.shape[-2])
    adapter.A.zero_()
    adapter.A[..., : vh.shape[-2], :] = vh.to(adapter.A)
    adapter.B.zero_()


def pissa(adapter: Factors, base: Base) -> None:
    """s·B A = the best rank-r part of W (PiSSA, arXiv 2404.02948): A = √S Vᵀ/√s, B = U √S/√s. Not zero."""
    u, s, vh = truncated_svd(base.matrix(), adapter.A.shape[-2])
    root = (s / adapter.scaling).sqrt()
    for factor in (adapter.A, adapter.B):
        factor.zero_()
    adapter.A[..., : vh.shape[-2], :] = (root[..., None] * vh).to(adapter.A)
    adapter.B[..., : u.shape[-1]] = (u * root[..., None, :]).to(adapter.B)


def olora(adapter: Factors, base: Base) -> None:
    """B A = the first r columns and rows of W's QR factors (OLoRA, arXiv 2406.01775), not divided by s. Not zero."""
    q, r = torch.linalg.qr(base.matrix().float())
    rank = min(adapter.A.shape[-2], q.shape[-1])
    for factor in (adapter.A, adapter.B):
        factor.zero_()
    adapter.A[..., :rank, :] = r[..., :rank, :].to(adapter.A)
    adapter.B[..., :rank] = q[..., :rank].to(adapter.B)


STARTS: dict[str, Callable[[Factors, Base], None]] = {
    "gaussian": gaussian,
    "kaiming": kaiming,
    "olora": olora,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "svd": svd,
}
NONZERO = frozenset({"olora", "pissa"})


def check_start(name: str) -> None:
    """Refuse an unknown start by name."""
    if name not in STARTS:
        raise SettingsError(f"init_lora_weights={name!r} is no start{suggest(name, STARTS)}")


def fill(name: str, adapter: Factors, base: Base) -> None:
    """Fill the adapter by the start `name`."""
    with torch.no_grad():
        STARTS[name](adapter, base)
