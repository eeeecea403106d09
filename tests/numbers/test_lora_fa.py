"""LoRA-FA (arXiv 2308.03303): A frozen, and the gradient of B projected onto the full gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from number_tools import Net, count, drive, linear, nudge, only, stage
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.presets import lora_fa
from rankloom.rules.projection import ProjectedGradient


def _fit_step(alpha: float, r: int = 2, rules: tuple = (ProjectedGradient(),), **settings):
    """ΔW after one SGD step of rate 0.1, and the full gradient g_W."""
    torch.manual_seed(0)
    model = linear(bias=False)
    x, target = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    weight = model.fc.weight.detach().clone().requires_grad_()
    (x @ weight.T - target).square().sum().backward()
    bank = rl.attach(model, rl.LoRA(r=r, lora_alpha=alpha, frozen="A", **settings))
    run = stage(model, optimizer=torch.optim.SGD([p for _, p, _ in bank.trainable()], lr=0.1))
    drive(run, rules, lambda: (model(x) - target).square().sum())
    return bank.delta("default")["fc"], weight.grad, only(bank).A


def test_projected_step():
    """Must hold: one SGD step gives ΔW = −η g_W Aᵀ(AAᵀ)⁻¹A, whatever the scale s."""
    delta, g, a = _fit_step(alpha=2.0)
    want = -0.1 * g @ a.T @ torch.linalg.solve(a @ a.T, a)
    assert torch.allclose(delta, want, rtol=1e-6, atol=1e-8)
    for alpha in (0.5, 32.0):
        assert (_fit_step(alpha=alpha)[0] - delta).abs().max() < 1e-13


def test_full_rank_is_full_finetuning():
    """Must hold: r = i equals the full fine-tuning step."""
    delta, g, _ = _fit_step(alpha=3.0, r=6)
    assert torch.allclose(delta, -0.1 * g, atol=1e-5)


def test_projection_is_the_nearest():
    """Mechanism: the projected gradient minimises ‖s ĝ A − g_W‖; any other ĝ is further away."""
    delta, g, a = _fit_step(alpha=4.0)
    best = (delta / -0.1 - g).norm()
    b = torch.linalg.lstsq(a.T, delta.T).solution.T
    for _ in range(20):
        other = (b + 1e-2 * torch.randn_like(b)) @ a
        assert (other / -0.1 - g).norm() > best


def test_without_projection():
    """Must hold: without the projection it is LoRA with A frozen."""
    alpha, r = 6.0, 2
    delta, g, a = _fit_step(alpha=alpha, r=r, rules=())
    assert torch.allclose(delta, -0.1 * (alpha / r) ** 2 * g @ a.T @ a, atol=1e-12)


def test_a_is_bitwise_constant():
    """Must hold: A is bitwise constant through training, and r·o numbers are trained."""
    model = linear()
    plan = lora_fa(r=3)
    bank = rl.attach(model, plan)
    assert count(bank) == 3 * 5
    a, b = only(bank).A.detach().clone(), only(bank).B
    x, target = torch.randn(8, 6).double(), torch.randn(8, 5).double()
    run = stage(model, 20, torch.optim.AdamW([b], lr=0.05))
    losses = drive(run, plan.rules, lambda: (model(x) - target).square().mean())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(only(bank).A, a)


def _saved_bytes(method: rl.LoRA, tokens: int = 16) -> int:
    """Bytes that depend on the batch and are kept for the backward of one adapted layer."""
    model = Net(fc=nn.Linear(48, 40))
    bank = rl.attach(model, method)
    nudge(bank)
    x = torch.randn(tokens, 48, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t):
        if t.ndim and t.shape[0] == tokens:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.fc(x).sum().backward()
    return sum(kept.values())


def test_saved_for_backward():
    """Must hold: per token the layer keeps the r numbers of A x, and not x: r/i of what LoRA adds for x."""
    r, tokens = 4, 16
    assert _saved_bytes(rl.LoRA(r=r), tokens) == 4 * tokens * (48 + r)
    assert _saved_bytes(lora_fa(r=r).method, tokens) == 4 * tokens * r


def test_each_site_has_its_own_scale():
    """Pitfall: rank_pattern gives sites different s; each projection takes its own."""
    torch.manual_seed(0)
    base = Net(p=nn.Linear(6, 5, bias=False).double(), q=nn.Linear(6, 5, bias=False).double())
    x, target = torch.randn(7, 6).double(), torch.randn(7, 10).double()
    grads = copy.deepcopy(base)
    (grads(x) - target).square().sum().backward()
    bank = rl.attach(base, lora_fa(r=2, lora_alpha=5), rank_pattern={"q": 4})
    run = stage(base, optimizer=torch.optim.SGD([p for _, p, _ in bank.trainable()], lr=0.1))
    drive(run, [ProjectedGradient()], lambda: (base(x) - target).square().sum())
    for name, adapter in bank.adapters("default"):
        a = adapter.A
        want = -0.1 * getattr(grads, name).weight.grad @ a.T @ torch.linalg.solve(a @ a.T, a)
        assert torch.allclose(bank.delta("default")[name], want, atol=1e-7)


def test_projection_stays_in_float32():
    """Pitfall: the projection is solved in float32, also for bf16 adapters and inside autocast."""
    model = linear(dtype=torch.float32)
    bank = rl.attach(model, rl.LoRA(r=3, frozen="A"))
    adapter = only(bank)
    gradient = torch.randn_like(adapter.B)
    adapter.B.grad = gradient.clone()
    with torch.autocast("cpu", torch.bfloat16):
        ProjectedGradient().after_backward(stage(model))
    a = adapter.A.double()
    want = gradient.double() @ torch.linalg.inv(a @ a.T) / adapter.scaling**2
    assert torch.allclose(adapter.B.grad.double(), want, rtol=1e-3, atol=1e-4)


def test_needs_a_frozen_a():
    """Cannot combine: without one frozen A the rule refuses the run by name."""
    model = linear()
    rl.attach(model, rl.LoRA(r=2))
    with pytest.raises(SettingsError, match="frozen A"):
        ProjectedGradient().start(stage(model))
