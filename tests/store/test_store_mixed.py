"""Bits under a budget (LQ-LoRA, arXiv 2311.12023): within the budget, one choice each, optimal where that can be checked."""

from __future__ import annotations

import itertools

import pytest
import torch

from rankloom.errors import SettingsError
from rankloom.ops.bits import _lagrange, allocate
from rankloom.store.mixed import candidates, errors, mix, sizes
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat


def _problem(rows, columns, seed):
    """Costs that fall with size, as errors do with bits, with some noise; items of very different size."""
    g = torch.Generator().manual_seed(seed)
    bits = 2 + 6 * torch.rand(columns, generator=g, dtype=torch.float64)
    numbers = torch.randint(1, 50, (rows, 1), generator=g).double()
    size = numbers * bits
    noise = 0.7 + 0.6 * torch.rand(rows, columns, generator=g, dtype=torch.float64)
    cost = numbers * 10 ** (2 * torch.rand(rows, 1, generator=g, dtype=torch.float64)) * 4**-bits * noise
    return cost, size, float((numbers * 3.5).sum().clamp_min(size.amin(1).sum()))


def _brute(cost, size, budget):
    rows, columns = len(cost), len(cost[0])
    best = min(
        (sum(cost[m][c] for m, c in enumerate(pick)), pick)
        for pick in itertools.product(range(columns), repeat=rows)
        if sum(size[m][c] for m, c in enumerate(pick)) <= budget
    )
    return float(best[0])


@pytest.mark.parametrize("solver", ["lagrange", "milp"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 6), (2, 5), (3, 6), (4, 6)])
def test_small_problems_match_brute_force(solver, rows, columns):
    """Must hold: for at most 4 matrices × 6 configurations the choice is the brute-force optimum, gap 0."""
    for seed in range(4):
        cost, size, budget = _problem(rows, columns, seed)
        found = allocate(cost, size, budget, solver)
        assert found.cost == pytest.approx(_brute(cost.tolist(), size.tolist(), budget), rel=1e-9)
        assert found.gap < 1e-6


@pytest.mark.parametrize("solver", ["lagrange", "milp"])
def test_within_budget_one_each(solver):
    """Must hold: exactly one choice for each matrix, within the budget; the sums reported are those of the choice."""
    for seed in range(4):
        cost, size, budget = _problem(30, 12, seed)
        found = allocate(cost, size, budget, solver)
        assert len(found.choice) == 30
        assert found.size == pytest.approx(float(size[torch.arange(30), list(found.choice)].sum()))
        assert found.cost == pytest.approx(float(cost[torch.arange(30), list(found.choice)].sum()))
        assert found.size <= budget * (1 + 1e-9)
        assert found.bound <= found.cost


def test_lagrange_is_near_the_optimum_and_knows_it():
    """The bound never exceeds the optimum, and the fast answer is within the gap that it reports, about 1 %."""
    for seed in range(6):
        cost, size, budget = _problem(40, 12, seed)
        fast, exact = allocate(cost, size, budget), allocate(cost, size, budget, "milp")
        assert exact.gap < 1e-6
        assert fast.bound <= exact.cost * (1 + 1e-9)
        assert exact.cost <= fast.cost * (1 + 1e-9)
        assert fast.cost <= fast.bound / (1 - fast.gap) * (1 + 1e-9)
        assert 0 < fast.gap < 0.02


def test_repair_spends_what_is_left():
    """Where multipliers alone stop short of the budget, the repair takes what still fits."""
    cost = torch.tensor([[10.0, 1.0, 0.0]] * 2, dtype=torch.float64)
    size = torch.tensor([[1.0, 2.0, 9.0]] * 2, dtype=torch.float64)
    choice, bound = _lagrange(cost, size, 11.5)
    assert sorted(choice.tolist()) == [1, 2]
    assert bound <= 1.0


def test_scale_of_costs_and_budget():
    """Pitfall: costs as small as 1e-12 or as large as 1e12 give the same choice."""
    cost, size, budget = _problem(12, 10, 0)
    for solver in ("lagrange", "milp"):
        choice = allocate(cost, size, budget, solver).choice
        assert allocate(cost * 1e-12, size, budget, solver).choice == choice
        assert allocate(cost * 1e12, size * 1e9, budget * 1e9, solver).choice == choice


def test_plenty_and_too_little():
    """A large budget takes the best of all; one below the smallest sizes is refused with that number."""
    cost, size, _ = _problem(20, 8, 1)
    for solver in ("lagrange", "milp"):
        rich = allocate(cost, size, 1e9, solver)
        assert rich.cost == pytest.approx(float(cost.amin(1).sum()))
        assert rich.gap < 1e-9
        least = float(size.amin(1).sum())
        assert allocate(cost, size, least, solver).size == pytest.approx(least)
        with pytest.raises(SettingsError, match=f"take {least:g} already"):
            allocate(cost, size, 0.9 * least, solver)


def test_refuses_bad_tables():
    with pytest.raises(SettingsError, match="both \\(matrices, candidates\\)"):
        allocate([[1.0, 2.0]], [[1.0]], 3)
    with pytest.raises(SettingsError, match="costs: every entry is a finite number"):
        allocate([[float("nan")]], [[1.0]], 3)
    with pytest.raises(SettingsError, match="solver='gurobi'"):
        allocate(*_problem(40, 12, 0), "gurobi")


def test_candidates_and_sizes():
    """Procedure: 432 configurations; size = n (b + b0/B0 + b1/(B0·B1))."""
    each = candidates()
    assert len(each) == len(set(each)) == 432
    table = sizes({"a": torch.empty(10, 10), "b": torch.empty(3)}, each)
    assert table.shape == (2, 432)
    best = each.index(NestedFloat(4, 8, "float32", 64, 256))
    assert table[0, best].item() == pytest.approx(100 * (4 + 8 / 64 + 32 / (64 * 256)))
    assert table[1, best].item() == pytest.approx(3 * 4.126953125)


FEW = tuple(NormalFloat(b, double=False) for b in (2, 3, 4, 8))


def test_important_matrices_get_the_bits():
    """A matrix of larger weights gets more bits; with Fisher information, the one that matters does."""
    g = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(32, 64, generator=g) * s for n, s in (("small", 0.1), ("large", 3.0))}
    mixed = mix(weights, 4.0, FEW)
    assert mixed.stores["large"].bits > mixed.stores["small"].bits
    assert mixed.bits <= 4.0
    assert mixed.bits * 2 * 2048 == pytest.approx(mixed.allocation.size)
    fisher = {"small": torch.full((32, 64), 1e4), "large": torch.full((32, 64), 1e-4)}
    turned = mix(weights, 4.0, FEW, fisher=fisher)
    assert turned.stores["small"].bits > turned.stores["large"].bits


def test_errors_by_hand():
    """Costs are squared errors, weighted, of what is left beside the low-rank part."""
    w, f = torch.randn(16, 64), torch.rand(16, 64)
    plain = errors({"w": w}, FEW)
    assert plain[0].tolist() == pytest.approx([(w - s.round_trip(w)).square().sum().item() for s in FEW], rel=1e-5)
    weighted = errors({"w": w}, FEW, {"w": f})
    assert weighted[0].tolist() == pytest.approx(
        [(f * (w - s.round_trip(w)).square()).sum().item() for s in FEW], rel=1e-5
    )
    planted = torch.randn(16, 2) @ torch.randn(2, 64)
    assert errors({"w": planted}, FEW, r=2).max() < 1e-8
    assert errors({"w": planted}, FEW).min() > 1e-5


def test_mixed_beats_one_store_at_the_same_size():
    """What it is for: matrices of different size of weights, 3.5 bits each: the mix errs less than 3 bits for all."""
    g = torch.Generator().manual_seed(1)
    weights = {f"w{i}": torch.randn(32, 64, generator=g) * 4.0**-i for i in range(5)}
    mixed = mix(weights, 3.5, FEW)
    assert mixed.allocation.cost < 0.5 * float(errors(weights, FEW)[:, 1].sum())


def test_refuses_missing_or_odd_fisher():
    w = {"layer": torch.randn(8, 64)}
    with pytest.raises(SettingsError, match="no Fisher information for 'layer'; did you mean 'layers'"):
        mix(w, 4.5, FEW, fisher={"layers": w["layer"]})
    with pytest.raises(SettingsError, match="has shape"):
        mix(w, 4.5, FEW, fisher={"layer": torch.zeros(8)})
    with pytest.raises(SettingsError, match="no weights"):
        mix({}, 4.5)
