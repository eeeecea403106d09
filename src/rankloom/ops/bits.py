"""One choice for each item within a budget: the cheapest allocation of bits to matrices.

Minimise Σ cost[m, c(m)] with Σ size[m, c(m)] ≤ budget, as in LQ-LoRA (Guo et al., ICLR 2024, arXiv 2311.12023), by
a Lagrange multiplier and greedy repair, or exactly by HiGHS. The multiplier's dual value bounds every allocation from
below, so the distance to the optimum is known either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rankloom.errors import MissingExtra, RankloomError, SettingsError

SMALL = 1 << 16
"""Problems with at most this many allocations are looked through one by one."""
SLACK = 1e-9
"""Relative excess over the budget that counts as rounding."""


@dataclass(frozen=True)
class Allocation:
    """`choice[m]`: the column taken for row m; `cost`, `size`: the sums; no allocation costs less than `bound`."""

    choice: tuple[int, ...]
    cost: float
    size: float
    bound: float

    @property
    def gap(self) -> float:
        """How far from the optimum at most, relative to the cost; 0 when it is the optimum."""
        return max(0.0, self.cost - self.bound) / self.cost if self.cost > 0 else 0.0


def allocate(
    costs: Tensor | Sequence[Sequence[float]],
    sizes: Tensor | Sequence[Sequence[float]],
    budget: float,
    solver: Literal["lagrange", "milp"] = "lagrange",
) -> Allocation:
    """The cheapest choice of one column in each row of `costs` (M, C) whose `sizes` (M, C) sum to at most `budget`.

    "lagrange" is fast, and exact for small problems; "milp" is exact (needs scipy). Raises `SettingsError` where
    nothing fits.
    """
    cost, size = (torch.as_tensor(t, dtype=torch.float64) for t in (costs, sizes))
    _check(cost, size, budget)
    rows = cost.shape[0]
    if solver == "milp":
        choice, bound = _milp(cost, size, budget)
    elif cost.shape[1] ** rows <= SMALL:
        choice, bound = _enumerate(cost, size, budget), None
    elif solver == "lagrange":
        choice, bound = _lagrange(cost, size, budget)
    else:
        raise SettingsError(f"solver={solver!r} is not one of 'lagrange', 'milp'")
    total, used = (float(t[torch.arange(rows), choice].sum()) for t in (cost, size))
    return Allocation(tuple(choice.tolist()), total, used, total if bound is None else min(bound, total))


def _check(cost: Tensor, size: Tensor, budget: float) -> None:
    if cost.ndim != 2 or cost.shape != size.shape or not cost.numel():
        raise SettingsError(f"costs {tuple(cost.shape)} and sizes {tuple(size.shape)}: both (matrices, candidates)")
    for name, table in (("costs", cost), ("sizes", size)):
        if not bool(torch.isfinite(table).all()) or bool((table < 0).any()):
            raise SettingsError(f"{name}: every entry is a finite number of at least 0")
    least = float(size.amin(1).sum())
    if least > budget * (1 + SLACK):
        raise SettingsError(
            f"budget={budget:g}: the smallest candidates take {least:g} already; raise the budget to that"
        )


def _enumerate(cost: Tensor, size: Tensor, budget: float) -> Tensor:
    totals, used = torch.zeros(1, dtype=cost.dtype), torch.zeros(1, dtype=cost.dtype)
    for c, s in zip(cost, size):
        totals, used = (totals[:, None] + c).flatten(), (used[:, None] + s).flatten()
    best = int(torch.where(used <= budget * (1 + SLACK), totals, torch.inf).argmin())
    return torch.stack(torch.unravel_index(torch.tensor(best), (cost.shape[1],) * cost.shape[0]))


def _lagrange(cost: Tensor, size: Tensor, budget: float) -> tuple[Tensor, float]:
    """The best feasible choice on the path of multipliers, repaired; and the best dual value."""
    room = budget * (1 + SLACK)
    unit = float(cost.max().clamp_min(1e-300)) / float(size.max().clamp_min(1e-300))

    def at(multiplier: float) -> tuple[Tensor, float, bool]:
        value = cost + multiplier * size
        lowest = value.amin(1, keepdim=True)
        choice = torch.where(value <= lowest, size, torch.inf).argmin(1)
        bound = float(lowest.sum()) - multiplier * room
        return choice, bound, float(_taken(size, choice).sum()) <= room

    choice, bound, fits = at(0.0)
    if fits:
        return choice, bound
    low, high = 0.0, unit
    while not fits:
        choice, dual, fits = at(high)
        bound = max(bound, dual)
        low, high = (low, high) if fits else (high, 4 * high)
    for _ in range(80):
        middle = (low * high) ** 0.5 if low else high / 4
        tried, dual, fits = at(middle)
        bound = max(bound, dual)
        if fits:
            choice, high = tried, middle
        else:
            low = middle
    repaired = [_repair(cost, size, choice, room, by_rate) for by_rate in (0.0, 1.0)]
    return min(repaired, key=lambda c: float(_taken(cost, c).sum())), bound


def _repair(cost: Tensor, size: Tensor, choice: Tensor, room: float, by_rate: float) -> Tensor:
    """Spend what is left: again and again the change that fits and gains most (`by_rate` 1: most for its size)."""
    choice = choice.clone()
    for _ in range(cost.numel()):
        gain = _taken(cost, choice)[:, None] - cost
        growth = size - _taken(size, choice)[:, None]
        left = room - float(_taken(size, choice).sum())
        worth = gain / growth.clamp_min(1e-12 * room) ** by_rate
        worth = torch.where((growth <= left) & (gain > 0), worth, -torch.inf)
        best = int(worth.argmax())
        if worth.flatten()[best] <= 0:
            break
        choice[best // cost.shape[1]] = best % cost.shape[1]
    return choice


def _taken(table: Tensor, choice: Tensor) -> Tensor:
    return table.gather(1, choice[:, None]).squeeze(1)


def _milp(cost: Tensor, size: Tensor, budget: float) -> tuple[Tensor, float]:
    """HiGHS on costs and sizes near 1. A solution beyond the budget by its tolerance is solved again below it."""
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
        from scipy.sparse import csr_array  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtra("scipy", "ilp", "solver='milp'") from error
    rows, columns = cost.shape
    n, unit = rows * columns, float(cost.max()) or 1.0
    once = csr_array((np.ones(n), (np.repeat(np.arange(rows), columns), np.arange(n))), shape=(rows, n))
    weights = csr_array(size.reshape(1, -1).numpy() / budget) if budget else csr_array((1, n))
    for room in (1 + SLACK, 1 - 1e-6):
        found = milp(
            cost.flatten().numpy() / unit,
            integrality=np.ones(n),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint(weights, -np.inf, room)],
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            raise RankloomError(f"HiGHS found no allocation: {found.message}; try solver='lagrange'")
        choice = torch.as_tensor(found.x).reshape(rows, columns).argmax(1)
        if float(_taken(size, choice).sum()) <= budget * (1 + SLACK):
            break
    bound = found.fun if found.mip_dual_bound is None else found.mip_dual_bound
    return choice, float(bound) * unit
