"""ReLoRA: low-rank changes folded in turn reach a high rank, and the run is one that can be stopped and taken up.

Facts: the function is the same across a restart; rank(Wₙ − W₀) reaches n·r; moments are dropped or pruned as asked; the
rate is 0 at a restart and continuous after its warm-up; without a restart it is LoRA bit for bit; a planted change of rank 4r
is learnt below what rank r can reach. Lialin et al., ICLR 2024, arXiv 2307.05695.
"""

import copy
import math

import pytest
import torch
from number_tools import only
from torch import nn

import rankloom as rl
from rankloom.core.targets import base_tensors
from rankloom.errors import SettingsError
from rankloom.rules.relora import ReLoRA, jagged_cosine, ramp
from rankloom.store.base import Packed, dense
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform
from rankloom.train.fit import fit
from rankloom.train.settings import TrainSettings

R, RANK = 2, 8
IN, OUT = 24, 16


def planted():
    """A linear base, and batches of what it says with a change of rank 4r: singular values 8, 7, … 1."""
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    u, v = (torch.linalg.qr(torch.randn(n, RANK))[0] for n in (OUT, IN))
    change = (u * torch.arange(RANK, 0, -1.0)) @ v.T
    x = torch.linalg.qr(torch.randn(4 * IN, IN))[0] * math.sqrt(4 * IN)
    batches = [(x, x @ (base[0].weight.detach() + change).T)]
    floor = float(torch.arange(RANK - R, 0, -1.0).square().sum()) / OUT
    return base, change, batches, floor


def trained(model, batches, rules, steps=500, **settings):
    torch.manual_seed(0)
    rl.attach(model, rl.LoRA(r=R, lora_alpha=float(R)), target_modules=["0"])
    torch.manual_seed(5)
    return fit(
        model, batches, rules=rules, settings=TrainSettings(steps=steps, lr=0.05, schedule="constant", **settings)
    )


def test_restarts_learn_what_one_low_rank_cannot():
    base, change, batches, floor = planted()
    plain, again = copy.deepcopy(base), copy.deepcopy(base)
    lora = trained(plain, batches, [])
    relora = trained(again, batches, [ReLoRA(every=100, restart_warmup=0)])
    assert lora.losses[-1] == pytest.approx(floor, rel=0.02)
    assert relora.losses[-1] < 0.05 * floor
    bank = again.rankloom
    total = again[0].weight.detach() - base[0].weight.detach() + bank.delta("default")["0"]
    assert (total - change).norm() < 0.1 * change.norm()
    assert int((torch.linalg.svdvals(total) > 0.1).sum()) > R


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_rank_of_what_was_folded_is_the_sum(n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 18, dtype=torch.float64))
    before = model[0].weight.detach().clone()
    bank = rl.attach(model, rl.LoRA(r=R), target_modules=["0"])
    seen = []
    for _ in range(n):
        with torch.no_grad():
            only(bank).B.normal_()
        seen.append(only(bank).A.detach().clone())
        bank.restart("default")
        assert not only(bank).B.any()
        assert not torch.equal(only(bank).A, seen[-1])
    assert int(torch.linalg.matrix_rank(model[0].weight.detach() - before, atol=1e-9)) == n * R


def test_the_function_is_the_same_across_every_restart():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    bank = rl.attach(model, rl.LoRA(r=R), target_modules=["0", "2"])
    x, gaps = torch.randn(32, 8), []

    class Watched(ReLoRA):
        def after_step(self, run):
            before = model(x).detach()
            super().after_step(run)
            gaps.append(float((model(x) - before).abs().max()))

    rule = Watched(every=5, restart_warmup=0)
    fit(model, [(x, torch.randn(32, 4))], rules=[rule], settings=TrainSettings(steps=21, lr=0.02))
    assert len(bank.journal) == 4
    assert len(gaps) == 21
    assert max(gaps) < 1e-6


def test_without_a_restart_it_is_lora_bit_for_bit():
    base, _, batches, _ = planted()
    one, two = copy.deepcopy(base), copy.deepcopy(base)
    plain = trained(one, batches, [], steps=12)
    found = trained(two, batches, [ReLoRA(every=12)], steps=12)
    assert plain.losses == found.losses
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert not len(two.rankloom.journal)


@pytest.mark.parametrize("store", [None, NormalFloat(4, block=16), Uniform(4, group=8)], ids=str)
@pytest.mark.parametrize("reset", ["zero", "random", "magnitude"])
def test_a_run_that_broke_off_after_a_fold_goes_on_bit_for_bit(store, reset, tmp_path):
    def make(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
        torch.manual_seed(seed)
        rl.attach(model, rl.LoRA(r=R, lora_dropout=0.2), store=store, target_modules=["0", "2"], bias="all")
        return model

    torch.manual_seed(3)
    batches = [(torch.randn(8, 16), torch.randn(8, 4)) for _ in range(5)]

    def run(model, out, resume=False, report=None):
        rule = ReLoRA(every=10, reset=reset, prune=0.7, restart_warmup=3)
        settings = TrainSettings(steps=30, lr=0.02, save_every=25, seed=1)
        return fit(model, batches, rules=[rule], settings=settings, out=tmp_path / out, resume=resume, report=report)

    class Broken(Exception):
        pass

    def break_off(row):
        if row["event"] == "save":
            raise Broken

    straight = make(1)
    whole = run(straight, "a")
    with pytest.raises(Broken):
        run(make(1), "b", report=break_off)
    other = make(2)
    found = run(other, "b", resume=True)
    assert found.losses == whole.losses
    for (path, _, key, mine), (_, _, _, theirs) in zip(base_tensors(other), base_tensors(straight)):
        assert torch.equal(dense(mine), dense(theirs)), f"{path}.{key}"
    x = batches[0][0]
    assert torch.equal(other.eval()(x), straight.eval()(x))
    assert len(other.rankloom.journal) == 2
    if store is not None:
        assert isinstance(other[0].weight, Packed)


def test_the_best_of_a_run_comes_back_with_the_base_that_it_had(tmp_path):
    base, _, batches, _ = planted()
    rl.attach(base, rl.LoRA(r=R), target_modules=["0"])
    losses = iter([5.0, 4.0, 1.0, 3.0, 2.0, 1.0])
    heard = []

    def evaluate(model):
        heard.append(model(batches[0][0]).detach().clone())
        return {"loss": next(losses)}

    settings = TrainSettings(steps=20, lr=0.05, eval_every=5, end_with="best", schedule="constant")
    rule = ReLoRA(every=4, restart_warmup=0)
    found = fit(base, batches, rules=[rule], settings=settings, evaluate=evaluate, out=tmp_path / "a")
    assert found.best.step == 10
    assert torch.allclose(base(batches[0][0]), heard[2], atol=1e-6)
    assert not torch.allclose(heard[2], heard[4], atol=1e-2)
    assert len(base.rankloom.journal) == 2


def test_a_four_bit_base_is_trained_and_stays_packed():
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(32, 16, bias=False))
    goal = base[0].weight.detach() + torch.randn(16, 8) @ torch.randn(8, 32)
    x = torch.randn(256, 32)
    batches = [(x, x @ goal.T)]
    bank = rl.attach(base, rl.LoRA(r=1), store=NormalFloat(4, block=16), target_modules=["0"])
    untrained = float((base(x) - batches[0][1]).square().mean())
    rule = ReLoRA(every=60, restart_warmup=0)
    settings = TrainSettings(steps=360, lr=0.05, schedule="constant")
    found = fit(base, batches, rules=[rule], settings=settings)
    assert isinstance(base[0].weight, Packed)
    assert len(bank.journal) == 5
    assert found.losses[-1] < 0.2 * untrained


# the rate -----------------------------------------------------------------------------------------------------------


def test_the_rate_is_zero_at_a_restart_and_continuous_after_its_warm_up():
    total, cycle, warmup, first, floor = 1000, 200, 20, 50, 0.1
    curve = [jagged_cosine(t, total, cycle, warmup, first, floor) for t in range(total + 1)]

    def cosine(t):
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (t - first) / (total - first)))

    assert curve[0] == 0
    assert curve[first] == 1
    for restart in (200, 400, 600, 800):
        assert curve[restart] == 0
        assert curve[restart + warmup // 2] == pytest.approx(cosine(restart + warmup) / 2)
        assert curve[restart + warmup] == pytest.approx(cosine(restart + warmup))
        assert abs(curve[restart + warmup] - curve[restart + warmup - 1]) < 1.1 / warmup
    assert curve[300] == pytest.approx(cosine(300))
    assert curve[199] == pytest.approx(cosine(199))
    assert min(c for t, c in enumerate(curve[:1000]) if t > first and t % cycle >= warmup) >= floor
    assert jagged_cosine(total, total, 2 * total, warmup, first, floor) == pytest.approx(floor)


def test_without_a_restart_the_rate_is_the_plain_cosine():
    for t in (0, 10, 500, 999):
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 1000))
        assert jagged_cosine(t, 1000, 1001, 50, 0, 0.1) == pytest.approx(cosine)
        assert jagged_cosine(t, 1000, 5000, 50, 0, 1.0) == 1
        assert ramp(t, 1000, 50) == 1
    assert [ramp(t, 4, 2) for t in range(9)] == [1, 1, 1, 1, 0, 0.5, 1, 1, 0]


class Standing:
    def __init__(self, step, total_steps):
        self.step, self.total_steps = step, total_steps


def test_the_rule_says_the_curve():
    rule = ReLoRA(every=10, restart_warmup=4, first_warmup=5, min_lr_ratio=0.2, cycle_length=20)
    for t in range(60):
        assert rule.rate(Standing(t, 60)) == jagged_cosine(t, 60, 20, 4, 5, 0.2)
    bare = ReLoRA(every=10, restart_warmup=4)
    assert [bare.rate(Standing(t, 60)) for t in (0, 9, 10, 12, 14, 20)] == [1, 1, 0, 0.5, 1, 0]


def test_the_optimizer_follows_the_curve_in_a_run():
    base, _, batches, _ = planted()
    rl.attach(base, rl.LoRA(r=R), target_modules=["0"])
    rule, rows = ReLoRA(every=10, restart_warmup=4, first_warmup=3, min_lr_ratio=0.1), []
    settings = TrainSettings(steps=30, lr=0.5, schedule="constant", log_every=1)
    fit(base, batches, rules=[rule], settings=settings, report=rows.append)
    rates = [row["lr"] for row in rows if row["event"] == "train"]
    assert rates == pytest.approx([0.5 * jagged_cosine(t, 30, 10, 4, 3, 0.1) for t in range(30)])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"every": 0}, "every=0"),
        ({"cycle_length": 0}, "cycle_length=0"),
        ({"restart_warmup": -1}, "restart_warmup=-1"),
        ({"reset": "half"}, "'zero', 'random', 'magnitude'"),
        ({"prune": 2.0}, "prune=2.0"),
        ({"min_lr_ratio": 0.0}, "min_lr_ratio=0.0"),
        ({"first_warmup": 3}, "belongs to the curve that min_lr_ratio"),
        ({"into": "16bit"}, "into='16bit'"),
    ],
)
def test_settings_without_a_meaning_are_refused(wrong, words):
    with pytest.raises(SettingsError, match=words):
        ReLoRA(**wrong)


def test_the_preset_trains_small_tensors_whole_beside_it():
    plan = rl.relora(every=7, r=4)
    assert plan.rules == (ReLoRA(every=7),)
    assert (plan.method.r, plan.method.lora_alpha) == (4, 32.0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    bank = rl.attach(model, plan, target_modules=["0"], modules_to_save=["1", "2"], bias="all")
    batches = [(torch.randn(16, 6), torch.randn(16, 3))]
    start = bank.state("default")
    fit(model, batches, settings=TrainSettings(steps=18, lr=0.02, warmup_steps=0))
    assert bank.journal.sites == ("0",)
    moved = {k for k, v in bank.state("default").items() if not torch.equal(v, start[k])}
    assert moved == start.keys()
