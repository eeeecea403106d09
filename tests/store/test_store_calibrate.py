"""What data says about weights: input magnitudes and Fisher information."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankloom.errors import StateError, UnreachedError
from rankloom.store.calibrate import activation_scales, balanced, fisher
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat


def test_scales_by_hooks_equal_manual():
    """Must hold (LQER): max over batches of the mean over tokens of |x|, at least 1e-4, over √(min·max)."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    batches = [torch.randn(3, 5, 4) * s for s in (1.0, 10.0, 0.1)]
    found = activation_scales({"0": model[0], "2": model[2]}, batches, model)
    for name, inputs in (("0", batches), ("2", [model[:2](b) for b in batches])):
        c = torch.stack([x.detach().abs().mean((0, 1)) for x in inputs]).amax(0)
        assert torch.allclose(found[name], c / (c.min() * c.max()).sqrt(), rtol=1e-6)
    assert not model[0]._forward_pre_hooks
    assert balanced(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.01, 100.0])


def test_scales_need_the_layer_to_be_called():
    model = nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 6)})
    with pytest.raises(UnreachedError, match="no batch reached the layer 'b'"):
        activation_scales(dict(model.items()), [torch.randn(1, 4)], model["a"])
    assert not model["a"]._forward_pre_hooks


def test_fisher_by_hand():
    """F = Σ over single examples of the squared gradient: for a linear layer and squared error, (2 e xᵀ)² summed."""
    layer = nn.Linear(4, 3, bias=False).requires_grad_(False)
    xs, ts = torch.randn(7, 4), torch.randn(7, 3)
    loss = lambda i: (layer(xs[i]) - ts[i]).square().sum()  # noqa: E731
    found = fisher({"w": layer.weight}, range(7), loss)["w"]
    want = sum((2 * torch.outer(layer(xs[i]) - ts[i], xs[i])).square() for i in range(7))
    assert torch.allclose(found, want, rtol=1e-5)
    layer.weight.requires_grad_()
    batch = torch.autograd.grad(sum(map(loss, range(7))), layer.weight)[0].square()
    assert not torch.allclose(found, batch, rtol=0.1)


def test_fisher_leaves_no_trace():
    """Flags and gradients stay; what the loss does not reach gets zeros; a packed weight is refused."""
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    a.weight.requires_grad_(False)
    found = fisher({"a": a.weight, "b": b.weight}, [torch.randn(4)], lambda x: a(x).sum())
    assert found["a"].any()
    assert not found["b"].any()
    assert not a.weight.requires_grad
    assert b.weight.requires_grad
    assert a.weight.grad is None
    keep(a, {"weight": NormalFloat()})
    with pytest.raises(StateError, match="'a' is packed and has no gradient"):
        fisher({"a": a.weight}, [], lambda x: a(x).sum())
