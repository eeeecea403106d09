"""Asymmetric LoRA (arXiv 2402.16842): each factor has its own start and is trained or kept."""

from __future__ import annotations

import pytest
import torch
from number_tools import Net, count, linear, minimise, nudge, only, stage
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.methods.asymmetric import AsymmetricLoRA
from rankloom.methods.residual import ResidualAdapter
from rankloom.presets import asymmetric_lora


def test_published_setting():
    """Must hold: A Aᵀ = I_r to 1e-6 and frozen, B = 0; identity at start; the trained share is o/(o+i) of LoRA's."""
    model, x = linear(12, 8), torch.randn(3, 12).double()
    before = model(x)
    bank = rl.attach(model, AsymmetricLoRA(r=4, lora_alpha=8))
    adapter = only(bank)
    assert torch.equal(model(x), before)
    assert torch.allclose(adapter.A @ adapter.A.T, torch.eye(4).double(), atol=1e-6)
    assert [k.rsplit(":")[-1] for k, _, _ in bank.trainable()] == ["B"]
    lora = linear(12, 8)
    assert count(bank) / count(rl.attach(lora, rl.LoRA(r=4))) == pytest.approx(8 / (8 + 12))


@pytest.mark.parametrize(("code", "kept"), [("A_rand_hB_zero", "A"), ("hA_zero_B_rand", "B")])
def test_the_frozen_factor_is_bitwise_unchanged(code, kept):
    """Must hold: the frozen factor does not move by a bit, and the other one learns."""
    model = linear()
    bank = rl.attach(model, asymmetric_lora(code, r=3, lora_alpha=3))
    adapter = only(bank)
    frozen = getattr(adapter, kept).detach().clone()
    x, target = torch.randn(9, 6).double(), torch.randn(9, 5).double()
    run = stage(model, 30, torch.optim.AdamW([p for _, p, _ in bank.trainable()], lr=0.05))
    start = (model(x) - target).square().mean().item()
    for _ in range(30):
        run.optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        run.optimizer.step()
    assert torch.equal(getattr(adapter, kept), frozen)
    assert (model(x) - target).square().mean().item() < 0.9 * start


def _least_squares(code: str, seed: int, d: int = 60, r: int = 4) -> tuple[float, float]:
    """(best loss E‖(D − BA)x‖², (1 − r/d)·Tr(UᵀDᵀDU)) for inputs of covariance UUᵀ of rank r."""
    torch.manual_seed(seed)
    u = torch.linalg.qr(torch.randn(d, r).double())[0]
    change = torch.randn(d, d).double() / d**0.5
    model = linear(d, d, bias=False)
    target = (model.fc.weight.detach() + change) @ u
    bank = rl.attach(model, asymmetric_lora(code, r=r, lora_alpha=r))
    loss = minimise([p for _, p, _ in bank.trainable()], lambda: (model(u.T).T - target).square().sum(), 60)
    return loss, (1 - r / d) * (change @ u).square().sum().item()


def test_b_is_the_factor_to_train():
    """Must hold: least squares, d = 60, r = 4, input of rank r: B alone fits, A alone leaves (1 − r/d)·Tr(U Uᵀ DᵀD)."""
    gaps, bounds = [], []
    for seed in range(4):
        b_only, bound = _least_squares("A_rand_hB_zero", seed)
        a_only, _ = _least_squares("hA_zero_B_rand", seed)
        assert b_only < 1e-6 * a_only
        gaps.append(a_only - b_only)
        bounds.append(bound)
    assert sum(gaps) == pytest.approx(sum(bounds), rel=0.05)


@pytest.mark.parametrize("code", ["A_zero_hB_zero", "hA_zero_hB_zero", "A_rand_B_zero", "hA_rand_B_zero"])
def test_dead_pairs_are_refused(code):
    """Must hold: A_zero + hB_zero (and every other pair without a gradient) is rejected."""
    with pytest.raises(SettingsError):
        asymmetric_lora(code)


def test_code_grammar():
    """Interface: the hat marks the trained factor; V and U are singular vectors; anything else is refused."""
    assert asymmetric_lora() == AsymmetricLoRA()
    assert asymmetric_lora("hA_V_last_B_U", r=2) == AsymmetricLoRA(
        r=2, init_A="svd_last", init_B="svd", update_A=True, update_B=False
    )
    with pytest.raises(SettingsError, match="A_rand_hB_zero"):
        asymmetric_lora("A_random_hB_zero")


def test_singular_starts_are_rows_of_vh():
    """Pitfall: V are the rows of Vh: they catch the largest (last: the smallest) part of W."""
    for start, pick in (("svd", slice(0, 2)), ("svd_last", slice(3, 5))):
        model = linear(6, 5)
        a = only(rl.attach(model, AsymmetricLoRA(r=2, init_A=start))).A
        w = model.fc.weight.detach()
        assert torch.allclose(a @ a.T, torch.eye(2).double(), atol=1e-10)
        caught = (w @ a.T).square().sum().item()
        assert caught == pytest.approx(torch.linalg.svdvals(w)[pick].square().sum().item(), rel=1e-9)


def test_two_nonzero_starts_are_still_identity():
    """Mechanism: U diag V starts at zero change, because the start is taken off."""
    model, x = linear(), torch.randn(3, 6).double()
    before = model(x)
    bank = rl.attach(model, asymmetric_lora("A_V_hB_U", r=2))
    assert isinstance(only(bank), ResidualAdapter)
    assert torch.equal(model(x), before)
    inner = only(bank).inner
    u, _, vh = torch.linalg.svd(model.fc.weight.detach())
    assert torch.allclose((inner.B @ inner.B.T), u[:, :2] @ u[:, :2].T, atol=1e-10)
    assert torch.allclose((inner.A.T @ inner.A), vh[:2].T @ vh[:2], atol=1e-10)
    nudge(bank)
    assert not torch.allclose(model(x), before)


def test_he_start_takes_each_factors_own_fan_in():
    """Mechanism: He-uniform with fan-in i for A and r for B."""
    model = Net(fc=nn.Linear(400, 300))
    adapter = only(rl.attach(model, asymmetric_lora("A_he_hB_zero", r=4)))
    assert 0.9 / 20 < adapter.A.abs().max() <= 1 / 20
    model = Net(fc=nn.Linear(400, 300))
    adapter = only(rl.attach(model, asymmetric_lora("hA_zero_B_he", r=4)))
    assert 0.9 / 2 < adapter.B.abs().max() <= 1 / 2
