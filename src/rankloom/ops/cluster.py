"""Clusters of points: k-means with spread-out seeds, and how many clusters there are.

k-means++: Arthur & Vassilvitskii, SODA 2007. Gap statistic: Tibshirani, Walther & Hastie, JRSS B 63, 2001 (box along
the principal axes); unlike a bare elbow it can also answer "one".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rankloom.errors import SettingsError


@dataclass(frozen=True)
class Clusters:
    """`centres` (k, d), `labels` (n,) int64, `inertia`: summed squared distance of the points to their centres."""

    centres: Tensor
    labels: Tensor
    inertia: float


@torch.no_grad()
def kmeans(x: Tensor, k: int, seed: int = 0, *, restarts: int = 4, iterations: int = 50) -> Clusters:
    """The best of `restarts` runs of Lloyd's algorithm on points x (n, d), n ≥ k, computed in float32 at least.

    The same on every call with the same seed. Raises SettingsError for k outside 1 … n or x that is not a matrix.
    """
    if x.ndim != 2 or not 1 <= k <= x.shape[0]:
        raise SettingsError(f"kmeans: k={k} clusters of points of shape {tuple(x.shape)}; x is (n, d) with n ≥ k ≥ 1")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    runs = (_lloyd(x, _spread_seeds(x, k, generator), iterations) for _ in range(restarts))
    return min(runs, key=lambda c: c.inertia)


@torch.no_grad()
def count_clusters(x: Tensor, max_k: int = 8, seed: int = 0, *, references: int = 10) -> int:
    """How many clusters the points x (n, d) form, 1 … max_k: the smallest k whose gap is within an error of the best.

    gap(k) is how much lower log inertia lies than for `references` uniform samples of the same box; the error is the
    standard one over those. Raises SettingsError for max_k below 1 or fewer than two points.
    """
    if max_k < 1 or x.ndim != 2 or x.shape[0] < 2:
        raise SettingsError(f"count_clusters: max_k={max_k}, points {tuple(x.shape)}; needs max_k ≥ 1 and x (n ≥ 2, d)")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = _principal_axes(x)
    generator = torch.Generator().manual_seed(seed)
    low, high = x.amin(0), x.amax(0)
    uniform = [torch.rand(x.shape, generator=generator).to(x) * (high - low) + low for _ in range(references)]
    ks = range(1, min(max_k, x.shape[0]) + 1)
    here = torch.tensor([_log_inertia(x, k, seed) for k in ks])
    there = torch.tensor([[_log_inertia(u, k, seed) for k in ks] for u in uniform])
    gap = there.mean(0) - here
    slack = there.std(0, correction=0) * (1 + 1 / references) ** 0.5
    best = int(gap.argmax())
    return int((gap >= gap[best] - slack[best]).int().argmax()) + 1


def _log_inertia(x: Tensor, k: int, seed: int) -> float:
    return float(torch.tensor(kmeans(x, k, seed, restarts=4).inertia).clamp_min(1e-12).log())


def _principal_axes(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    vh: Tensor = torch.linalg.svd(centred, full_matrices=False)[2]
    return centred @ vh.mT


def _spread_seeds(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k points, each next one drawn in proportion to its squared distance from those already taken."""
    chosen = [int(torch.randint(x.shape[0], (), generator=generator))]
    nearest = (x - x[chosen[0]]).square().sum(-1)
    for _ in range(k - 1):
        weights = nearest.cpu().double()
        if not weights.any():
            weights = torch.ones_like(weights)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(-1))
    return x[chosen]


def _lloyd(x: Tensor, centres: Tensor, iterations: int) -> Clusters:
    labels = torch.cdist(x, centres).argmin(-1)
    for _ in range(iterations):
        centres = _means(x, labels, centres)
        moved = torch.cdist(x, centres).argmin(-1)
        if bool((moved == labels).all()):
            break
        labels = moved
    return Clusters(centres, labels, float((x - centres[labels]).square().sum()))


def _means(x: Tensor, labels: Tensor, old: Tensor) -> Tensor:
    """Means of the clusters; an empty one keeps its centre."""
    counts = torch.bincount(labels, minlength=len(old))[:, None]
    sums = torch.zeros_like(old).index_add_(0, labels, x)
    return torch.where(counts > 0, sums / counts.clamp_min(1), old)
