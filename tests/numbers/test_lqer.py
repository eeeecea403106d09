"""LQER and L²QER (arXiv 2402.02446): the quantisation error's low-rank part, under the scale of the activations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankloom.errors import SettingsError
from rankloom.ops.decompose import lqer
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.calibrate import activation_scales
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

STORE = BlockFloat(4, 16)


def _weight(seed=0, out=96, in_=64):
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))


def _scale(in_=64, seed=1):
    return torch.logspace(-1, 1, in_)[torch.randperm(in_, generator=torch.Generator().manual_seed(seed))]


def _errors(w, split, c):
    rest = w - split.q - split.b @ split.a
    return rest.norm().item(), (rest * c).norm().item()


@pytest.mark.parametrize("store", [STORE, NormalFloat(3), Uniform(2, 16)], ids=["mxint4", "nf3", "int2"])
def test_plain_error_falls_with_rank(store):
    """Must hold: k = 0 is plain quantisation; the error never rises with k; 0 at full rank."""
    w = _weight()
    none = lqer(w, store, 0)
    assert torch.equal(none.q + 0, store.round_trip(w))
    assert none.a.numel() == none.b.numel() == 0
    assert none.errors == (pytest.approx((w - store.round_trip(w)).norm().item(), rel=1e-6),)
    last = none.error
    for r in (1, 2, 8, 32, 63):
        now = lqer(w, store, r).error
        assert now < last
        last = now
    for c in (None, _scale()):
        assert lqer(w, store, 64, c).error < 1e-4 * none.error


def test_by_hand():
    """Mechanism: E = U S Vᵀ, b = U_k S_k, a = V_kᵀ: the transposed layout of the paper's B_k and A_k."""
    w = _weight()
    split = lqer(w, STORE, 3)
    u, s, vh = torch.linalg.svd(w - STORE.round_trip(w), full_matrices=False)
    assert torch.allclose(split.b @ split.a, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], atol=1e-5)
    assert torch.allclose(split.a @ split.a.T, torch.eye(3), atol=1e-5)
    x = torch.randn(5, 64)
    assert torch.allclose(
        x @ (split.q + split.b @ split.a).T, x @ STORE.round_trip(w).T + x @ split.a.T @ split.b.T, atol=1e-4
    )


def test_weighted_error_falls_and_plain_error_rises():
    """Must hold: L²QER minimises ‖(E − Ê) diag(c)‖: below LQER there, above it in the plain norm, for any c and rank."""
    c = _scale()
    for seed in range(3):
        for r in (4, 16):
            w = _weight(seed)
            plain, scaled = _errors(w, lqer(w, STORE, r), c), _errors(w, lqer(w, STORE, r, c), c)
            assert scaled[1] < 0.97 * plain[1]
            assert scaled[0] > plain[0]


def test_weighted_optimum():
    """The correction is the best of its rank under diag(c): the rest's weighted energy is the tail of the singular values."""
    w, c = _weight(), _scale()
    s = torch.linalg.svdvals((w - STORE.round_trip(w)) * c)
    assert _errors(w, lqer(w, STORE, 7, c), c)[1] == pytest.approx(s[7:].norm().item(), rel=1e-4)


def test_constant_scale_is_lqer():
    """Must hold: c = const gives LQER."""
    w = _weight()
    plain, scaled = lqer(w, STORE, 5), lqer(w, STORE, 5, torch.full((64,), 3.7))
    assert torch.allclose(plain.b @ plain.a, scaled.b @ scaled.a, atol=1e-5)


def test_calibrated_output_error():
    """What it is for: on inputs with outlier channels the layer's output errs less with the calibrated scale."""
    layer = nn.Linear(64, 96, bias=False)
    x = torch.randn(400, 64) * _scale()
    c = activation_scales({"layer": layer}, x.split(100), layer)["layer"]
    w = layer.weight.detach()
    output = {}
    for name, scale in (("plain", None), ("scaled", c)):
        split = lqer(w, STORE, 8, scale)
        output[name] = (x @ (w - split.q - split.b @ split.a).T).norm().item()
    none = (x @ (w - STORE.round_trip(w)).T).norm().item()
    assert output["scaled"] < 0.95 * output["plain"] < none


def test_factors_in_eight_bits():
    """Procedure: A_k and B_k are quantised too; the error reported is that of the quantised ones, hardly larger."""
    w = _weight()
    exact, kept = lqer(w, STORE, 8), lqer(w, STORE, 8, factors=BlockFloat(8, 16))
    assert torch.equal(BlockFloat(8, 16).round_trip(kept.a), kept.a)
    assert not torch.equal(kept.a, exact.a)
    assert kept.error == pytest.approx((w - kept.q - kept.b @ kept.a).norm().item(), rel=1e-4)
    assert exact.error < kept.error < 1.01 * exact.error


def test_scale_of_an_adapter():
    """As a frozen adapter of scale s: s b a is the correction."""
    w = _weight()
    unit, half = lqer(w, STORE, 5), lqer(w, STORE, 5, scale=0.5)
    assert torch.allclose(0.5 * half.b @ half.a, unit.b @ unit.a, atol=1e-6)


def test_refuses_a_scale_that_does_not_fit():
    for c in (torch.ones(5), torch.zeros(64)):
        with pytest.raises(SettingsError, match="act_scale of shape"):
            lqer(_weight(), STORE, 2, c)
