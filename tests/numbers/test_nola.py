"""NOLA (arXiv 2310.02556): factors that are trained combinations of random matrices, never stored."""

from __future__ import annotations

import copy

import pytest
import torch
from number_tools import Net, count, linear, minimise, nudge, only
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.methods.nola import NOLA
from rankloom.ops.counter import combined, products, uniform

CPU = torch.device("cpu")


def bases(adapter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A₀ (r, in), A_k (K, r, in), B_k (K, out, r) by the paper's formula, scaled."""
    (r, in_), shape_b = adapter.shapes
    k, m = adapter.a.shape[-1], adapter.b.shape[-1]
    start = uniform(adapter.keys[0], 0, 1, (r, in_), CPU)[0].double() / in_**0.5
    a = uniform(adapter.keys[1], 0, k, (r, in_), CPU).double() / k**0.5
    return start, a, uniform(adapter.keys[2], 0, m, shape_b, CPU).double() / m**0.5


def test_equation_on_explicit_matrices():
    """Must hold: forward and gradients equal autograd on the explicit matrices: y = W x + (alpha/r) B A x."""
    model, x = linear(), torch.randn(3, 6).double()
    before = model(x)
    adapter = only(rl.attach(model, NOLA(r=2, lora_alpha=4.0, num_basis_A=7, num_basis_B=5, chunk=3)))
    nudge(model.rankloom)
    start, a_k, b_k = bases(adapter)
    a, b = adapter.a.detach().clone().requires_grad_(), adapter.b.detach().clone().requires_grad_()
    want = before.detach() + 2 * (x @ (start + torch.einsum("k,kri->ri", a, a_k)).T) @ torch.einsum("k,kor->ro", b, b_k)
    assert torch.allclose(model(x), want, atol=1e-12)
    g = torch.randn(3, 5).double()
    (model(x) * g).sum().backward()
    (want * g).sum().backward()
    assert torch.allclose(adapter.a.grad, a.grad, atol=1e-12)
    assert torch.allclose(adapter.b.grad, b.grad, atol=1e-12)


def test_backward_of_the_combination():
    """Must hold: the custom backward equals finite differences, stacked experts too."""
    c = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: combined(c, 5, (3, 4), 4), c)


def test_count_does_not_depend_on_shapes():
    """Must hold: K_A + K_B trained numbers a layer, whatever r, out and in."""
    for r, in_, out in ((1, 6, 5), (16, 40, 24)):
        assert count(rl.attach(linear(in_, out), NOLA(r=r, num_basis_A=9, num_basis_B=4))) == 13


def test_identity_and_first_gradient():
    """Must hold: identity at init; there grad a = 0 and grad b ≠ 0, which A₀ makes possible."""
    model, x = linear(), torch.randn(3, 6).double()
    before = model(x)
    adapter = only(rl.attach(model, NOLA(r=2, num_basis_A=8, num_basis_B=8)))
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert not adapter.a.grad.any()
    assert adapter.b.grad.abs().min() > 0
    start, _, _ = bases(adapter)
    assert start.abs().max() <= 1 / 6**0.5


def test_without_a0_both_gradients_vanish():
    """Must hold: without A₀ neither coefficient would have a gradient at init."""
    model, x = linear(), torch.randn(3, 6).double()
    adapter = only(rl.attach(model, NOLA(r=2, num_basis_A=8, num_basis_B=8)))
    _, a_k, b_k = bases(adapter)
    a, b = torch.zeros(8).double().requires_grad_(), torch.zeros(8).double().requires_grad_()
    out = (x @ torch.einsum("k,kri->ri", a, a_k).T) @ torch.einsum("k,kor->ro", b, b_k)
    (model.fc(x).detach() + out).square().sum().backward()
    assert not a.grad.any()
    assert not b.grad.any()


def test_global_generator_is_untouched():
    """Must hold: building, forward and backward leave the global generator as it was, and forward repeats bitwise."""
    model, x = linear(), torch.randn(3, 6).double()
    state = torch.get_rng_state()
    bank = rl.attach(model, NOLA(r=2, num_basis_A=8, num_basis_B=8))
    with torch.no_grad():
        for _, p, _ in bank.trainable():
            p.fill_(0.3)
    one, two = model(x), model(x)
    one.sum().backward()
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_do_not_matter(chunk):
    """Must hold: chunked equals unchunked, in forward and in backward."""
    c, g = torch.randn(8).double(), torch.randn(3, 4).double()
    assert torch.allclose(combined(c, 9, (3, 4), chunk), combined(c, 9, (3, 4), 8), atol=1e-14)
    assert torch.allclose(products(g, 9, 8, chunk), products(g, 9, 8, 8), atol=1e-14)


def test_enough_matrices_recover_a_free_factor():
    """Must hold: K ≥ r·in recovers any A; fewer do not."""
    want, losses = torch.randn(3, 4).double(), []
    for k in (6, 24):
        c = torch.zeros(k).double().requires_grad_()
        losses.append(minimise([c], lambda c=c: (combined(c, 3, (3, 4), 8) - want).square().sum(), 300))
    assert losses[0] > 1e-2
    assert losses[1] < 1e-12


def test_saves_coefficients_only(tmp_path):
    """Must hold: the file holds a and b and no matrix; loaded under any state of the generator it is the same."""
    from safetensors import safe_open

    base, x = Net(p=nn.Linear(6, 5), q=nn.Linear(6, 5)), torch.randn(3, 6)
    model = copy.deepcopy(base)
    nudge(rl.attach(model, NOLA(r=2, num_basis_A=8, num_basis_B=9, seed=4)))
    rl.save(model, tmp_path / "a")
    with safe_open(next((tmp_path / "a").glob("*.safetensors")), "pt") as file:
        assert sorted(file.get_slice(key).get_shape()[0] for key in file.keys()) == [8, 8, 9, 9]  # noqa: SIM118
    torch.manual_seed(99)
    again = copy.deepcopy(base)
    rl.load(again, tmp_path / "a").use("default")
    assert torch.equal(again(x), model(x))


def test_layers_and_seeds_draw_their_own_matrices():
    """At odds in the paper: as in the released code, every layer has matrices of its own; another seed, others."""
    model = Net(p=nn.Linear(6, 5), q=nn.Linear(6, 5))
    p, q = (a for _, a in rl.attach(model, NOLA(r=2)).adapters())
    other = only(rl.attach(Net(p=nn.Linear(6, 5)), NOLA(r=2, seed=1)))
    assert len({*p.keys, *q.keys, *other.keys}) == 9


def test_numbers_are_uniform_and_independent():
    """Matrices: uniform in ±1, uncorrelated between matrices and between neighbours, full rank."""
    u = uniform(77, 0, 256, (8, 40), CPU).flatten(1)
    assert u.abs().max() <= 1
    assert u.mean().abs() < 0.01
    assert 3 * u.var() == pytest.approx(1, abs=0.02)
    assert (3 * u[:, 1:] * u[:, :-1]).mean().abs() < 0.02
    assert torch.linalg.matrix_rank(u) == 256
    part = uniform(77, 100, 3, (8, 40), CPU)
    assert torch.equal(part.flatten(1), u[100:103])


def test_merge_is_exact():
    """Must hold: merges."""
    model, x = linear(), torch.randn(3, 6).double()
    bank = rl.attach(model, NOLA(r=2, num_basis_A=8, num_basis_B=8))
    nudge(bank)
    adapted = model(x)
    bank.merge()
    assert torch.allclose(model(x), adapted, atol=1e-12)


@pytest.mark.parametrize("wrong", [{"num_basis_A": 0}, {"num_basis_B": 0}, {"chunk": 0}, {"r": 0}])
def test_refusals(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        NOLA(**wrong)
