"""BiLoRA's facts: the hypergradient, what each level hears, its values, and AdaLoRA as its special case."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from number_tools import nudge
from torch import nn

import rankloom as rl
from rankloom.core.rule import Rule
from rankloom.errors import SettingsError
from rankloom.methods.bilora import BiLoRA, BiLoRAAdapter
from rankloom.rules.bilevel import hypergradient
from rankloom.train.fit import fit
from rankloom.train.named import split_streams
from rankloom.train.settings import TrainSettings


class Model(nn.Module):
    """Two layers with a loss of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.second(self.first(x).tanh())
        return {"loss": nn.functional.mse_loss(out, labels), "logits": out}


def adapted(**settings: Any) -> Model:
    model = Model()
    torch.manual_seed(1)
    rl.attach(model, BiLoRA(**{"r": 3, "upper_lr": 0.05, **settings}), target_modules=["first", "second"])
    return model


def rows(n: int = 10, seed: int = 2) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    x = [torch.randn(5, 6, generator=draw, dtype=torch.float64) for _ in range(n)]
    return [{"x": one, "labels": 2 * one[:, :3].tanh()} for one in x]


def lower(model: nn.Module, streams: Any) -> torch.Tensor:
    return model(**streams["lower"])["loss"]


def tensors(model: nn.Module, *roles: str) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p, role in model.rankloom.tensors("default") if not roles or role in roles}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("unroll", [1, 40])
def test_hypergradient_of_a_quadratic(unroll):
    """L₁ = ½‖V − M E‖² has V*(E) = M E: by finite differences within 1e-3 of the exact gradient, by the first-order
    form not. One step of ξ = 1 reaches V*; so do 40 of ξ = 0.3, each of which has its share of the second term.
    """
    torch.manual_seed(3)
    m, n = torch.randn(5, 4).double(), torch.randn(4).double()
    target = torch.randn(5).double()
    v, e = nn.Parameter(torch.randn(5).double()), nn.Parameter(torch.randn(4).double())
    before = v.detach().clone()

    def l1() -> torch.Tensor:
        return 0.5 * (v - m @ e).square().sum()

    def l2() -> torch.Tensor:
        return 0.5 * (v - target).square().sum() + n @ e

    xi = 1.0 if unroll == 1 else 0.3
    exact = m.mT @ (m @ e.detach() - target) + n
    (found,) = hypergradient(l1, l2, [v], [e], xi, unroll)
    (first,) = hypergradient(l1, l2, [v], [e], xi, unroll, "first")
    assert float((found - exact).abs().max()) < 1e-3
    assert float((first - exact).abs().max()) > 0.1
    assert torch.equal(v, before)


def test_values_never_learn_from_the_lower_stream():
    """E does not move but by its own optimizer; and with the lower level still, its steps in the first-order form do
    not depend on the labels of D1.
    """
    still = adapted(sv_param="real", upper_lr=1e-12)
    nudge(still.rankloom)
    before = tensors(still, "singular")
    fit(still, {"lower": rows(3), "upper": rows(3, 5)}, loss=lower, steps=3, lr=0.05)
    assert all(torch.allclose(t, before[k], atol=1e-9) for k, t in tensors(still, "singular").items())
    ends = []
    for labels in (1.0, -3.0):
        model = adapted(sv_param="real", hypergrad="first", gamma1=0.0)
        one, other = rows(3), rows(3, seed=5)
        for batch in one:
            batch["labels"] = batch["labels"] * labels
        settings = TrainSettings(steps=1, lr=1e-12, schedule="constant")
        fit(model, {"lower": one, "upper": other}, loss=lower, settings=settings)
        ends.append(tensors(model, "singular"))
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=1e-9) for k in ends[0])
    assert any(float(t.abs().max()) > 1e-3 for t in ends[0].values())


def test_vectors_never_learn_from_the_upper_stream():
    """Swap the labels of D2: with E held still, P and Q go the same way bit for bit."""

    class Hold(Rule):
        """E stays at its start."""

        def after_step(self, run):
            for _, p, role in run.bank.trainable():
                if role == "singular":
                    p.data.fill_(0.5)

        before_step = after_step

    ends = []
    for sign in (1.0, -1.0):
        model, other = adapted(sv_param="real"), rows(3, seed=5)
        for batch in other:
            batch["labels"] = sign * batch["labels"]
        fit(model, {"lower": rows(3), "upper": other}, loss=lower, steps=6, lr=0.02, rules=[Hold()])
        ends.append(tensors(model, "in", "out"))
    assert same(*ends)


def test_softmax_keeps_its_sum():
    """Values are positive and sum to 1 before, during and after; the change is zero at the start in every form."""
    for form in ("real", "softmax", "binary"):
        model = adapted(sv_param=form)
        batch = rows(1)[0]
        assert torch.equal(model(**batch)["logits"], Model()(**batch)["logits"])
        fit(model, {"lower": rows(3), "upper": rows(3, 5)}, loss=lower, steps=5, lr=0.05)
        values = [a.values() for _, a in model.rankloom.adapters(of=BiLoRAAdapter)]
        assert not all(torch.allclose(v, v[0].expand_as(v)) for v in values)
        if form == "softmax":
            assert all(torch.allclose(v.sum(), torch.ones_like(v.sum())) and float(v.min()) > 0 for v in values)
        if form == "binary":
            assert all(float(v.min()) > 0 and float(v.max()) < 1 for v in values)


def test_one_level_with_real_values_is_adalora():
    """hypergrad="none", real values, no penalty: the tensors of AdaLoRA without masking, step for step."""
    mine, other, alpha = (
        adapted(sv_param="real", hypergrad="none", gamma1=0.0, lora_alpha=8.0),
        Model(),
        8 / 3 * 3.00001,
    )
    torch.manual_seed(1)
    method = rl.AdaLoRA(init_r=3, target_r=3, lora_alpha=alpha, orth_reg_weight=0.0)
    rl.attach(other, method, target_modules=["first", "second"])
    for model in (mine, other):
        torch.manual_seed(4)
        nudge(model.rankloom)
        fit(model, rows(4), steps=6, lr=0.02)
    a, b = tensors(mine), tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-9) for k in a)


def test_streams_never_share_an_index():
    """Every row goes to one stream, by its share; the same seed deals alike, another does not."""
    found = split_streams(list(range(50)), lower=0.8, upper=0.2)
    assert sorted(found["lower"] + found["upper"]) == list(range(50))
    assert (len(found["lower"]), len(found["upper"])) == (40, 10)
    assert found == split_streams(list(range(50)), lower=0.8, upper=0.2)
    assert found != split_streams(list(range(50)), seed=1, lower=0.8, upper=0.2)
    for shares in ({"lower": 0.8}, {"lower": 1.2, "upper": -0.2}, {}):
        with pytest.raises(SettingsError, match="add up to 1"):
            split_streams(range(5), **shares)
    with pytest.raises(SettingsError, match="'upper'"):
        split_streams(range(2), lower=0.9, upper=0.1)


def test_penalties():
    """γ₁ draws the vectors towards orthonormality, γ₂ binary values to 0 or 1."""
    apart = []
    for gamma in (0.0, 1.0):
        model = adapted(gamma1=gamma)
        fit(model, {"lower": rows(3), "upper": rows(3, 5)}, loss=lower, steps=80, lr=0.05)
        grams = [a.A @ a.A.mT for _, a in model.rankloom.adapters(of=BiLoRAAdapter)]
        apart.append(sum(float((g - torch.eye(3)).detach().square().sum()) for g in grams))
    assert apart[1] < 0.1 * apart[0]
    between = []
    for gamma in (0.0, 5.0):
        model = adapted(sv_param="binary", gamma2=gamma)
        fit(model, {"lower": rows(3), "upper": rows(3, 5)}, loss=lower, steps=60, lr=0.01)
        values = torch.cat([a.values() for _, a in model.rankloom.adapters(of=BiLoRAAdapter)])
        between.append(float((values * (1 - values)).mean()))
    assert between[1] < 0.7 * between[0]


def test_resume_carries_the_upper_optimizer(tmp_path):
    """Broken off and resumed: both levels end bit for bit alike."""
    streams = split_streams(rows(10), lower=0.8, upper=0.2)
    settings = TrainSettings(steps=8, lr=0.02, save_every=5, accumulate=2)

    def stop(row: Any) -> None:
        if row["event"] == "save" and row["step"] == 5:
            raise KeyError

    straight, broken, again = adapted(), adapted(), adapted()
    fit(straight, streams, loss=lower, settings=settings, out=tmp_path / "a")
    with suppress(KeyError):
        fit(broken, streams, loss=lower, settings=settings, out=tmp_path / "b", report=stop)
    fit(again, streams, loss=lower, settings=settings, out=tmp_path / "b", resume=True)
    assert same(tensors(straight), tensors(again))
    assert not same(tensors(broken), tensors(again))


def test_it_learns_and_merges():
    """Both levels together come down on held-out data, below one level's frozen values; merging keeps the outputs."""
    model, held = adapted(r=4, gamma1=0.0), rows(4, seed=9)
    before = sum(float(model(**b)["loss"]) for b in held)
    found = fit(model, split_streams(rows(10), lower=0.8, upper=0.2), loss=lower, steps=150, lr=0.03)
    after = sum(float(model(**b)["loss"]) for b in held)
    assert after < 0.5 * before
    assert found.steps == 150
    said = model(**held[0])["logits"]
    model.rankloom.merge("default")
    assert torch.allclose(model(**held[0])["logits"], said, atol=1e-10)


def test_one_stream_is_refused():
    """Not silent: plain batches, naming both remedies; settings out of range; a model without a loss."""
    with pytest.raises(SettingsError, match=r"split_streams.*hypergrad='none'"):
        fit(adapted(), rows(2), steps=1)
    for wrong in ({"sv_param": "soft"}, {"hypergrad": "second"}, {"unroll": 0}, {"gamma1": -1.0}, {"upper_lr": 0.0}):
        with pytest.raises(SettingsError):
            BiLoRA(**wrong)
