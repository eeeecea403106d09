"""LQ-LoRA (arXiv 2311.12023): SVD first, then quantise what is left; Fisher weights; bits by budget (tests/store)."""

from __future__ import annotations

import pytest
import torch

from rankloom.errors import SettingsError
from rankloom.ops.decompose import loftq, low_rank, lq
from rankloom.store.base import Packed
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat


def _planted(noise, seed=0):
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(128, 8, generator=g) @ torch.randn(8, 192, generator=g) / 8**0.5
    return low + noise * torch.randn(128, 192, generator=g)


def _weighted(w, split, fisher):
    return (fisher.sqrt() * (w - split.q - split.b @ split.a)).norm().item()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_planted_low_rank(bits, noise):
    """Must hold: W = planted rank 8 + small noise, r = 16: SVD first errs at least five times less than LoftQ's Q first."""
    w, store = _planted(noise), NormalFloat(bits, double=False)
    assert 5 * lq(w, store, 16).error < loftq(w, store, 16, 5).error


def test_first_step_by_hand():
    """Mechanism: L R = svd_r(W), then Q = q(W − L R)."""
    w, store = _planted(0.1), NormalFloat()
    split = lq(w, store, 4, max_iters=1)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    low = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    assert torch.allclose(split.b @ split.a, low, atol=1e-4)
    assert torch.allclose(split.q + 0, store.round_trip(w - low), atol=1e-3)
    assert isinstance(split.q, Packed)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_stops_when_the_error_rises_and_returns_the_best(bits):
    """Must hold: errors fall until the last, which rises; what comes back is the best, and never needs all 100 rounds."""
    w, store = torch.randn(64, 128), NormalFloat(bits)
    split = lq(w, store, 8)
    falling = split.errors[:-1]
    assert list(falling) == sorted(falling, reverse=True)
    assert split.errors[-1] >= falling[-1]
    assert split.best == len(falling) - 1
    assert split.error == pytest.approx((w - split.q - split.b @ split.a).norm().item(), rel=1e-4)
    assert 2 <= len(split.errors) < 100
    assert split.error < (w - store.round_trip(w)).norm()
    assert len(lq(w, store, 8, max_iters=2).errors) == 2


def test_constant_fisher_reduces_to_unweighted():
    """Must hold: F = const gives the unweighted split."""
    w, store = _planted(0.1), NormalFloat(3)
    plain, weighted = lq(w, store, 8), lq(w, store, 8, torch.full_like(w, 0.3))
    assert torch.allclose(plain.b @ plain.a, weighted.b @ weighted.a, atol=1e-4)
    assert weighted.error == pytest.approx(0.3**0.5 * plain.error, rel=1e-4)


def test_weighted_error_is_never_above_the_unweighted_one():
    """Must hold: the weighted error is at most that of the unweighted solution, also where F has no rank-one part."""
    g = torch.Generator().manual_seed(0)
    rank_one = torch.rand(96, 1, generator=g) ** 3 @ torch.rand(1, 128, generator=g) ** 3
    wild = torch.rand(96, 128, generator=g) ** 8
    for fisher, least in ((rank_one, 0.85), (wild, 1.0)):
        for seed in range(3):
            w = torch.randn(96, 128, generator=torch.Generator().manual_seed(seed))
            plain, weighted = lq(w, NormalFloat(3), 16), lq(w, NormalFloat(3), 16, fisher)
            assert weighted.error <= least * _weighted(w, plain, fisher) * (1 + 1e-6)
            assert weighted.error == pytest.approx(_weighted(w, weighted, fisher), rel=1e-4)


def test_rank_one_weights_in_closed_form():
    """Mechanism: under F = f gᵀ the best rank-r part is D1⁻¹ svd_r(D1 W D2) D2⁻¹: no step of descent finds a better one."""
    f, g = torch.rand(20, 1).double() + 0.1, torch.rand(1, 30).double() + 0.1
    w, root = torch.randn(20, 30).double(), (f @ g).sqrt()
    left, right = low_rank(w, 3, fisher=f @ g)
    best = (root * (w - left @ right)).norm()
    assert best.item() == pytest.approx(torch.linalg.svdvals(root * w)[3:].norm().item(), rel=1e-10)
    plain = low_rank(w, 3)
    assert best < (root * (w - plain[0] @ plain[1])).norm()
    for _ in range(20):
        moved = (left + 1e-3 * torch.randn_like(left)) @ (right + 1e-3 * torch.randn_like(right))
        assert (root * (w - moved)).norm() > best


@pytest.mark.parametrize("zeros", [(slice(0, 3), slice(None)), (slice(None), slice(0, 5)), (slice(None), slice(None))])
def test_zero_fisher(zeros):
    """Pitfall: rows, columns or all of F zero: no division by zero."""
    w, fisher = torch.randn(20, 30), torch.rand(20, 30)
    fisher[zeros] = 0
    split = lq(w, NormalFloat(), 4, fisher)
    assert torch.isfinite(split.a).all()
    assert torch.isfinite(split.b).all()
    assert split.error <= _weighted(w, lq(w, NormalFloat(), 4), fisher) * (1 + 1e-5)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_divides_by_the_scale(scale):
    """Must hold: s b a = L1 L2."""
    w = _planted(0.1)
    unit, split = lq(w, NestedFloat(3, 4), 8), lq(w, NestedFloat(3, 4), 8, scale=scale)
    assert torch.allclose(scale * split.b @ split.a, unit.b @ unit.a, atol=1e-4)
    assert split.errors == unit.errors


def test_table_of_four_bits():
    """Must hold: the NF table by its formula equals bitsandbytes' for k = 4."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from rankloom.store.normalfloat import quantiles

    theirs = functional.get_4bit_type("nf4", device="cpu")
    assert torch.equal(torch.tensor(quantiles(4)), theirs)


def test_refuses():
    with pytest.raises(SettingsError, match="same shape, at least 0"):
        lq(torch.randn(4, 4), None, 2, torch.ones(3, 4))
    with pytest.raises(SettingsError, match="same shape, at least 0"):
        lq(torch.randn(4, 4), None, 2, -torch.ones(4, 4))
    with pytest.raises(SettingsError, match="max_iters=0"):
        lq(torch.randn(4, 4), None, 2, max_iters=0)
