"""Gradient checkpointing gives the same gradients, whatever is active."""

import threading

import pytest
import torch
from core_tiny import llama, nudge, tokens

import rankloom as rl

IDS = tokens()


def gradients(model, bank, **selection):
    model.train()
    model.zero_grad()
    with bank.using(**selection) if selection else bank.using("a"):
        model(IDS, labels=IDS).loss.backward()
    return {key: p.grad.clone() for key, p, _ in bank.trainable("a", "b") if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", [rl.LoRA(r=2, lora_dropout=0.2), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=3)], ids=str)
@pytest.mark.parametrize("selection", [{}, {"a": 0.5, "b": 2.0}, {"rows": ["a", "b"]}], ids=str)
def test_the_same_gradients(reentrant, method, selection):
    model = llama()
    plan = {"target_modules": ["q_proj", "v_proj", "down_proj"], "modules_to_save": ["norm", "input_layernorm"]}
    for seed, name in enumerate(("a", "b")):
        bank = rl.attach(model, method, name, **plan if "rows" not in selection else {"target_modules": ["q_proj"]})
        nudge(bank, name, seed=seed)
    torch.manual_seed(7)
    expected = gradients(model, bank, **selection)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(7)
    found = gradients(model, bank, **selection)
    assert model.is_gradient_checkpointing
    wanted = {"a", "b"} if selection else {"a"}
    assert {key.split("/")[0] for key in found} == wanted
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-12)
    assert all(grad.abs().max() > 0 for grad in found.values())


def test_checkpointed_experts():
    from test_core_experts import EXPERTS, mixtral

    model = mixtral().double()
    bank = rl.attach(model, rl.LoRA(r=2), "a", **EXPERTS)
    rl.attach(model, rl.LoRA(r=2), "b", target_modules=["q_proj"])
    nudge(bank)
    expected = gradients(model, bank)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, bank)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad)


class Deep(torch.autograd.Function):
    """Backward inside backward, deeper than autograd goes in one thread: `act` runs in a thread of autograd's own."""

    @staticmethod
    def forward(ctx, x, depth, act):
        ctx.depth, ctx.act = depth, act
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            if ctx.depth:
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.act).sum().backward()
            else:
                ctx.act()
        return gradient, None, None


def test_recomputation_in_a_thread_of_autograd_hears_the_selection_of_the_caller():
    """On an accelerator the backward pass, and so the recomputation, runs in such a thread."""
    model = llama()
    for seed, name in enumerate(("a", "b")):
        bank = rl.attach(model, rl.LoRA(r=2), name, target_modules=["q_proj"])
        nudge(bank, name, seed=seed)
    seen = []

    def act():
        seen.append((threading.get_ident(), model(IDS).logits.detach()))

    def backward():
        Deep.apply(torch.ones(1, requires_grad=True), 70, act).sum().backward()

    with torch.no_grad(), bank.using("b"):
        expected = model(IDS).logits
    with bank.using("a"), bank.using("b"):
        backward()
    backward()
    (first, in_block), (_, outside) = seen
    assert first != threading.get_ident()
    assert torch.equal(in_block, expected)
    assert torch.equal(outside, model(IDS).logits)
    assert not torch.equal(outside, expected)
