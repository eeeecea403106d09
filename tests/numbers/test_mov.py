"""MoV (arXiv 2309.05444): (IA)³ vectors as experts."""

from __future__ import annotations

import copy

import pytest
import torch
from number_tools import count, linear, nudge, only

import peft
import rankloom as rl
from rankloom.errors import NotMergeable, SettingsError, TargetError
from rankloom.gates.constant import Constant
from rankloom.gates.linear import Linear
from rankloom.gates.task import Task
from rankloom.gates.topk import TopK

X = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(2)).double()


def moved(n=4, std=0.3, **settings):
    torch.manual_seed(0)
    model = linear(7, 6)
    bank = rl.attach(model, rl.MoV(n, **settings))
    nudge(bank, std)
    return model, bank, only(bank)


@pytest.mark.parametrize("gate", [Linear(std=0.02), TopK(2, "kept"), TopK(1, "one")])
def test_identity_at_start_for_every_gate(gate):
    """Must hold (1): dense as published. Top-k without renormalising would shrink z by the sum of its weights there;
    here the change is of v − 1, so it starts at nothing."""
    model = linear(7, 6)
    before = model(X)
    rl.attach(model, rl.MoV(4, gate))
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("inputs", [(), ("fc",)])
def test_one_vector_is_ia3(inputs):
    """Must hold (2): n = 1 is (IA)³, PEFT's, for outputs and for inputs."""
    model, bank, adapter = moved(n=1, inputs=inputs)
    base = copy.deepcopy(model)
    rl.detach(base)
    config = peft.IA3Config(target_modules=["fc"], feedforward_modules=list(inputs))
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        own = next(p for n, p in theirs.named_parameters() if "ia3_l" in n)
        own.copy_(adapter.vectors.reshape(own.shape))
    assert torch.allclose(model(X), theirs(X), atol=1e-6)
    with bank.using():
        assert not torch.allclose(model(X), theirs(X), atol=1e-2)


@pytest.mark.parametrize(("inputs", "d"), [((), 6), (("fc",), 7)])
def test_count(inputs, d):
    """Must hold (3): n·d + n·d_router numbers, d the scaled activation's width."""
    bank = rl.attach(linear(7, 6), rl.MoV(5, inputs=inputs))
    assert count(bank) == 5 * d + 5 * d
    if not inputs:
        assert count(rl.attach(linear(7, 6), rl.MoV(5, head_dim=3))) == 5 * 6 + 5 * 3


def test_equal_vectors_leave_the_router_without_gradient():
    """Must hold (4)."""
    model, _, adapter = moved()
    with torch.no_grad():
        adapter.vectors.copy_(adapter.vectors[:1].expand_as(adapter.vectors).clone())
    model(X).square().sum().backward()
    assert adapter.gate.scores.weight.grad.abs().max() < 1e-6
    assert adapter.vectors.grad.abs().max() > 1e-2


@pytest.mark.parametrize("inputs", [(), ("fc",)])
def test_merging_vectors_is_mixing_outputs(inputs):
    """Must hold (5) and the mechanism by hand: z ∘ Σ g_i v_i = Σ g_i (z ∘ v_i), g = softmax(R z) of z itself."""
    model, bank, adapter = moved(inputs=inputs)
    with bank.using():
        y = model(X)
    z = X if inputs else y
    g = torch.softmax(z.float() @ adapter.gate.scores.weight.float().T, -1).double()
    each = torch.stack([z * v for v in adapter.vectors], -2)
    mixed = (g[..., None] * each).sum(-2)
    wanted = mixed @ model.fc.weight.T + model.fc.bias if inputs else mixed
    assert torch.allclose(model(X), wanted, atol=1e-6)


def test_heads_are_routed_one_by_one():
    """Pitfall: for keys and values one router of the head's width weighs each head by itself."""
    model, bank, adapter = moved(head_dim=3)
    with bank.using():
        y = model(X)
    heads = y.unflatten(-1, (2, 3))
    g = torch.softmax(heads.float() @ adapter.gate.scores.weight.float().T, -1).double()
    assert g.shape == (2, 5, 2, 4)
    assert not torch.allclose(g[..., 0, :], g[..., 1, :], atol=1e-3)
    wanted = torch.stack(
        [heads[..., h, :] * (g[..., h, :] @ adapter.vectors[:, 3 * h : 3 * h + 3]) for h in range(2)], -2
    ).flatten(-2)
    assert torch.allclose(model(X), wanted, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"head_dim": 2}, {"inputs": ("fc",)}])
def test_it_merges_with_weights_that_do_not_look(settings):
    model, bank, _ = moved(gate=Constant((0.1, 0.2, 0.3, 0.6)), **settings)
    said = model(X)
    bank.merge()
    assert torch.allclose(model(X), said, atol=1e-6)
    other, bank, _ = moved()
    with pytest.raises(NotMergeable, match="'fc' depends on its input"):
        bank.merge()


def test_refusals_name_site_and_value():
    with pytest.raises(SettingsError, match="n=0"):
        rl.MoV(0)
    with pytest.raises(TargetError, match="'fc' has 6 rows, not a multiple of head_dim=4"):
        rl.attach(linear(7, 6), rl.MoV(2, head_dim=4))
    with pytest.raises(SettingsError, match="by a layer's gate"):
        rl.attach(linear(7, 6), rl.MoV(2, Task(3)))
    with pytest.raises(TargetError, match="mov: site '0' is a conv2d"):
        rl.attach(torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1)), rl.MoV(2), target_modules=["0"])


def test_it_learns_scales_that_depend_on_the_token():
    """Planted: two kinds of tokens need opposite scales. One vector is left with their mean."""
    torch.manual_seed(0)
    kind = (torch.arange(64) % 2).double()[:, None]
    x = torch.cat([torch.randn(64, 6).double(), 6 * kind - 3], -1)
    scales = torch.rand(2, 6).double() * 1.5
    losses = {}
    for n in (2, 1):
        torch.manual_seed(1)
        model = linear(7, 6)
        bank = rl.attach(model, rl.MoV(n, Linear(bias=True)))
        with torch.no_grad(), bank.using():
            y = model(x)
            wanted = y * torch.where(kind > 0, scales[1], 2 - scales[0])
        optimizer = torch.optim.Adam([p for _, p, _ in bank.trainable()], lr=3e-2)
        for _ in range(400):
            optimizer.zero_grad()
            loss = (model(x) - wanted).square().mean()
            loss.backward()
            optimizer.step()
        losses[n] = loss.item()
    assert losses[2] < 0.5 * losses[1], losses
