"""LoftQ (arXiv 2310.08659): Q = q(W − L R) and L R = svd_r(W − Q) in turn; the best iterate is kept."""

from __future__ import annotations

import pytest
import torch

from rankloom.errors import SettingsError
from rankloom.ops.decompose import loftq, low_rank
from rankloom.store.base import Packed
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

STORES = {
    "nf4": NormalFloat(4, double=False),
    "nf2": NormalFloat(2),
    "int3": Uniform(3, 32),
    "mxint4": BlockFloat(4),
}
every_store = pytest.mark.parametrize("store", STORES.values(), ids=STORES)


def _gaussian(seed=0, shape=(128, 192)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_store
def test_first_step_always_helps(store):
    """Must hold: the error after one step is below ‖W − q(W)‖; errors[0] is that of plain quantisation."""
    for seed in range(3):
        w = _gaussian(seed)
        split = loftq(w, store, 16, iters=1)
        assert split.errors[0] == pytest.approx((w - store.round_trip(w)).norm().item(), rel=1e-5)
        assert split.errors[1] < split.errors[0]
        assert split.best == 1


def test_published_figures():
    """Must hold: NF4, r = 16, Gaussian 128 × 192: the first SVD takes the error from 1 to .238/.289 of itself."""
    errors = loftq(_gaussian(), STORES["nf4"], 16, iters=1).errors
    assert errors[1] / errors[0] == pytest.approx(0.238 / 0.289, rel=0.01)


def test_first_step_by_hand():
    """Mechanism: L R is the rank-r SVD of the plain quantisation error, balanced: L = U√S, R = √S Vᵀ."""
    w, store = _gaussian(), STORES["nf4"]
    split = loftq(w, store, 5, iters=1)
    u, s, vh = torch.linalg.svd(w - store.round_trip(w), full_matrices=False)
    assert torch.allclose(split.b @ split.a, u[:, :5] @ torch.diag(s[:5]) @ vh[:5], atol=1e-5)
    assert torch.allclose(split.b.T @ split.b, torch.diag(s[:5]), atol=1e-4)
    assert torch.allclose(split.a @ split.a.T, torch.diag(s[:5]), atol=1e-4)


@every_store
def test_best_of_t(store):
    """Must hold: the returned error never rises with T; it is the least of the history, and that of what is returned."""
    w = _gaussian(1)
    last = float("inf")
    for iters in range(7):
        split = loftq(w, store, 8, iters=iters)
        assert len(split.errors) == iters + 1
        assert split.error == min(split.errors)
        assert split.error == pytest.approx((w - split.q - split.b @ split.a).norm().item(), rel=1e-4)
        assert split.error <= last * (1 + 1e-6)
        last = split.error


def test_the_history_is_not_monotone():
    """Pitfall: at 2 bits the sequence rises again, and what comes back is not the last iterate."""
    split = loftq(_gaussian(), NormalFloat(2, double=False), 16, iters=5)
    assert split.errors[5] > split.errors[4] > split.errors[3]
    assert split.best == 3


@every_store
def test_no_iterations_is_qlora(store):
    """Must hold: T = 0 is QLoRA: Q = q(W) byte for byte, factors zero."""
    w = _gaussian()
    split = loftq(w, store, 8, iters=0)
    assert isinstance(split.q, Packed)
    want = store.encode(w)
    assert all(torch.equal(split.q.parts[n], want[n]) for n in want)
    assert not split.a.any()
    assert not split.b.any()
    assert (split.a.shape, split.b.shape) == ((8, 192), (128, 8))


@every_store
def test_full_rank_leaves_nothing(store):
    """Must hold: with r = full rank the error is 0; factors beyond the rank are zero."""
    w = _gaussian(shape=(16, 64))
    for r in (16, 20):
        split = loftq(w, store, r, iters=1)
        assert split.error < 1e-5 * w.norm()
        assert split.a.shape == (r, 64)
        assert not split.a[16:].any()


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_divides_by_the_scale(scale):
    """Must hold: s b a = L R whatever s; the pitfall of the peers is off by s."""
    w, store = _gaussian(), STORES["nf4"]
    split, unit = loftq(w, store, 16, 3, scale), loftq(w, store, 16, 3)
    assert torch.allclose(scale * split.b @ split.a, unit.b @ unit.a, atol=1e-6)
    assert torch.allclose(split.a, unit.a / scale**0.5)
    assert split.errors == unit.errors
    assert (w - split.q - scale * split.b @ split.a).norm().item() == pytest.approx(split.error, rel=1e-4)


def test_sixteen_bits_leave_w():
    """Must hold: without a store W stays, and there is nothing to correct."""
    w = _gaussian()
    split = loftq(w, None, 8)
    assert torch.equal(split.q, w)
    assert not split.b.any()
    assert split.error == 0


def test_dtype():
    """bf16 weights are split in float32; the kept weight is logically bf16 and its bytes are those of the float32 rest."""
    w = _gaussian().bfloat16()
    split, wide = loftq(w, STORES["nf4"], 8, 2), loftq(w.float(), STORES["nf4"], 8, 2)
    assert split.q.dtype == torch.bfloat16
    assert split.a.dtype == torch.float32
    assert split.errors == wide.errors
    assert all(torch.equal(split.q.parts[n], p) for n, p in wide.q.parts.items())
    assert loftq(w.double(), None, 8).a.dtype == torch.float64


def test_randomized_svd():
    """The sketch finds what the exact SVD finds where values fall, is the same every time, and leaves torch's seed alone."""
    torch.manual_seed(1)
    w = torch.randn(96, 6) @ torch.diag(10.0 ** -torch.arange(6)) @ torch.randn(6, 80) + 1e-7 * torch.randn(96, 80)
    state = torch.get_rng_state()
    left, right = low_rank(w, 4, "randomized")
    assert torch.equal(torch.get_rng_state(), state)
    exact = low_rank(w, 4)
    assert (left @ right - exact[0] @ exact[1]).norm() < 1e-4 * exact[1].norm()
    assert torch.equal(low_rank(w, 4, "randomized")[0], left)
    rough, fine = loftq(_gaussian(), STORES["nf4"], 16, 2, svd="randomized"), loftq(_gaussian(), STORES["nf4"], 16, 2)
    assert rough.error == pytest.approx(fine.error, rel=0.01)


def test_refuses():
    for call, message in (
        (lambda: loftq(torch.randn(3), None, 2), "no matrix"),
        (lambda: loftq(torch.randn(3, 3), None, -1), "r=-1"),
        (lambda: loftq(torch.randn(3, 3), None, 2, -1), "iters=-1"),
        (lambda: loftq(torch.randn(3, 3), None, 2, 1, 0.0), "scale=0.0"),
    ):
        with pytest.raises(SettingsError, match=message):
            call()
