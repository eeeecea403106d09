"""LoRAHub: weights for a library of LoRAs from a few examples, without a gradient.

Facts: weights 0 are the base, a unit vector is that adapter; factor composition is even in w and has cross terms, delta
composition is odd; CMA-ES solves a convex quadratic in the box; a planted task is found. arXiv 2307.13269.
"""

import copy
import sys

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom.compose.lorahub import SEARCHES, LoRAHub
from rankloom.errors import MissingExtra, NotMergeable, SettingsError

NAMES = [f"t{i}" for i in range(6)]
X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net():
    torch.manual_seed(3)
    return nn.ModuleDict({"body": nn.Linear(12, 10), "head": nn.Linear(10, 8)}).double()


def say(model, x=X):
    return model["head"](torch.tanh(model["body"](x)))


def library(n=6, r=2, alphas=None):
    """n LoRAs of one rank, each with a scale of its own."""
    model = net()
    for i, name in enumerate(NAMES[:n]):
        alpha = (alphas or [1.0, 2.0, 4.0, 2.0, 3.0, 1.0])[i]
        bank = rl.attach(model, rl.LoRA(r=r, lora_alpha=alpha), name, target_modules=["body", "head"])
        generator = torch.Generator().manual_seed(10 + i)
        for _, p, _ in bank.tensors(name):
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 2)
    return model, bank


def composed(bank, weights, mode="factor"):
    hub = LoRAHub(mode=mode)
    hub.apply(bank, weights, "new")
    with bank.using("new"), torch.no_grad():
        out, change = say(bank.model), bank.delta("new")
    rl.detach(bank.model, "new")
    return out, change


def unit(j, size=1.0):
    return {name: size * (i == j) for i, name in enumerate(NAMES)}


@pytest.mark.parametrize("mode", ["factor", "delta"])
def test_zero_is_the_base_and_a_unit_vector_is_that_adapter(mode):
    model, bank = library()
    with torch.no_grad():
        torch.testing.assert_close(composed(bank, unit(0, 0.0), mode)[0], say(net()))
        for j, name in enumerate(NAMES):
            with bank.using(name):
                torch.testing.assert_close(composed(bank, unit(j), mode)[0], say(model))


def test_factors_are_even_in_the_weights_and_deltas_are_odd():
    _, bank = library()
    weights = dict(zip(NAMES, [0.4, -1.1, 0.3, 0.9, -0.2, 1.4]))
    minus = {name: -w for name, w in weights.items()}
    for at, change in composed(bank, weights)[1].items():
        torch.testing.assert_close(composed(bank, minus)[1][at], change)
    for at, change in composed(bank, weights, "delta")[1].items():
        torch.testing.assert_close(composed(bank, minus, "delta")[1][at], -change)


def test_factors_have_cross_terms():
    _, bank = library()
    own = {n: {s.name: s.adapter for s in bank.sites(n)} for n in NAMES[:2]}
    found = composed(bank, {"t0": 0.5, "t1": 0.5})[1]
    plain = composed(bank, {"t0": 0.5, "t1": 0.5}, "delta")[1]
    for at in ("body", "head"):
        wanted = sum(
            (own[i][at].scaling * own[j][at].scaling) ** 0.5 * own[i][at].B @ own[j][at].A / 4 for i in own for j in own
        )
        torch.testing.assert_close(found[at], wanted.detach())
        assert (found[at] - plain[at]).norm() > 0.1 * plain[at].norm()


def planted(mode="factor"):
    """Few examples of a task that is adapter 3 of 6."""
    model, bank = library()
    with bank.using("t3"), torch.no_grad():
        target = say(model, X[:16])
    return bank, [(X[:8], target[:8]), (X[8:16], target[8:])]


def error(model, batch):
    return (say(model, batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("mode", ["factor", "delta"])
def test_a_planted_task_is_found(mode):
    bank, batches = planted(mode)
    singles = {}
    for name in NAMES:
        with bank.using(name), torch.no_grad():
            singles[name] = float(sum(error(bank.model, b) for b in batches) / 2)
    found = LoRAHub(mode=mode, budget=150, seed=1).search(bank, NAMES, batches=batches, loss=error)
    assert max(found.weights, key=lambda n: abs(found.weights[n])) == "t3"
    LoRAHub(mode=mode).apply(bank, found.weights, "new")
    with bank.using("new"), torch.no_grad():
        loss = float(sum(error(bank.model, b) for b in batches) / 2)
    assert loss < sum(singles.values()) / 6
    assert loss + 0.05 * sum(map(abs, found.weights.values())) / 6 == pytest.approx(found.value, rel=1e-6)
    assert found.value == min(found.evaluations)
    assert len(found.evaluations) <= 150


@pytest.mark.parametrize("mode", ["factor", "delta"])
def test_no_gradient_is_taken_and_the_bank_is_left_as_it_was(mode):
    bank, batches = planted(mode)
    bank.use("t1")
    bank.model.train()
    before = {n: bank.state(n) for n in NAMES}
    said, flags = say(bank.model).detach(), {k: p.requires_grad for k, p in bank.model.named_parameters()}
    seen = []

    def loss(model, batch):
        found = error(model, batch)
        seen.append((found.requires_grad, torch.is_grad_enabled(), model.training))
        seen.extend((p.requires_grad, False, False) for k, p in model.named_parameters() if ".rankloom-hub." in k)
        return found

    weights = LoRAHub(mode=mode, budget=10)(bank, NAMES, batches=batches, loss=loss)
    assert set(weights) == set(NAMES)
    assert set(seen) == {(False, False, False)}
    assert all(p.grad is None for p in bank.model.parameters())
    assert {k: p.requires_grad for k, p in bank.model.named_parameters()} == flags
    assert bank.active == {"t1": 1.0}
    assert bank.names == tuple(NAMES)
    assert bank.model.training
    assert torch.equal(say(bank.model), said)
    assert all(torch.equal(v, before[n][k]) for n in NAMES for k, v in bank.state(n).items())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cma_solves_a_planted_quadratic_in_the_box(seed):
    import numpy as np

    draw = torch.Generator().manual_seed(4)
    q = torch.linalg.qr(torch.randn(10, 10, generator=draw, dtype=torch.float64))[0]
    matrix = q @ torch.diag(torch.linspace(1, 10, 10, dtype=torch.float64)) @ q.T
    goal = torch.rand(10, generator=draw, dtype=torch.float64) * 2 - 1
    seen = []

    def objective(point):
        seen.append(list(point))
        off = torch.tensor(point, dtype=torch.float64) - goal
        return float(off @ matrix @ off)

    np.random.seed(9)
    state = np.random.get_state()[1].copy()
    best, value = SEARCHES["cma"](objective, 10, LoRAHub(budget=1000, seed=seed))
    assert (np.random.get_state()[1] == state).all()
    assert value < 1e-3
    assert len(seen) <= 1000
    assert all(abs(v) <= 1.5 for point in seen for v in point)
    assert best in seen
    again = SEARCHES["cma"](objective, 10, LoRAHub(budget=1000, seed=seed))
    assert again == (best, value)


@pytest.mark.parametrize("optimizer", ["one_plus_one", "random", "cma"])
@pytest.mark.parametrize("n", [1, 3])
def test_every_search_keeps_to_its_budget_and_its_box(optimizer, n):
    seen = []

    def objective(point):
        seen.append(point)
        return sum((v - 0.7) ** 2 for v in point)

    for budget in (1, 2, 37):
        seen.clear()
        best, value = SEARCHES[optimizer](objective, n, LoRAHub(budget=budget, bound=1.0, optimizer=optimizer))
        assert seen[0] == [0.0] * n
        assert len(seen) == budget
        assert all(abs(v) <= 1.0 for point in seen for v in point)
        assert value == min(objective(p) for p in list(seen))
        assert best in seen
    assert value < 0.5 * n * 0.49


def test_many_names_are_drawn_from():
    names = [f"a{i}" for i in range(50)]
    hub = LoRAHub(num_modules=20, seed=3)
    drawn = hub.candidates(names)
    assert len(set(drawn)) == 20
    assert drawn == hub.candidates(names) == sorted(drawn, key=names.index)
    assert drawn != LoRAHub(seed=4).candidates(names)
    assert LoRAHub().candidates(names[:5]) == names[:5]


def test_what_cannot_be_composed_is_refused(monkeypatch):
    bank, batches = planted()
    rl.attach(bank.model, rl.LoRA(r=5), "wide", target_modules=["body"])
    rl.attach(bank.model, rl.DoRA(rl.LoRA(r=2)), "dora", target_modules=["body"])
    hub, evidence = LoRAHub(budget=3), {"batches": batches, "loss": error}
    for names, kind, words in (
        (["t0", "wide"], SettingsError, "one rank"),
        (["t0", "dora"], NotMergeable, "'dora'"),
        ([], SettingsError, "names of the adapters"),
    ):
        with pytest.raises(kind, match=words):
            hub(bank, names, **evidence)
    with pytest.raises(SettingsError, match="at least one batch"):
        hub(bank, ["t0"], batches=[], loss=error)
    for wrong in ({"mode": "both"}, {"optimizer": "ngopt"}, {"budget": 0}, {"l1": -1.0}, {"bound": 0.0}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            LoRAHub(**wrong)
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MissingExtra, match="search"):
        hub(bank, ["t0", "t1"], **evidence)
    assert bank.names == (*NAMES, "wide", "dora")


def test_the_composition_is_a_lora_as_any_other(tmp_path):
    bank, _ = planted()
    LoRAHub().apply(bank, {"t0": 0.5, "t2": -1.0}, "new")
    rl.save(bank.model, tmp_path / "new", "new")
    other = net()
    rl.load(other, tmp_path / "new")
    with bank.using("new"):
        torch.testing.assert_close(say(other), say(bank.model))
    merged = copy.deepcopy(bank.model)
    merged.rankloom.merge("new")
    torch.testing.assert_close(say(merged), say(other))
