"""Gradient checkpointing gives the same gradients, whatever speaks."""

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
@pytest.mark.parametrize("selection", [dict(), dict(a=0.5, b=2.0), dict(rows=["a", "b"])], ids=str)
def test_the_same_gradients(reentrant, method, selection):
    model = llama()
    plan = dict(target_modules=["q_proj", "v_proj", "down_proj"], modules_to_save=["norm", "input_layernorm"])
    for seed, name in enumerate(("a", "b")):
        bank = rl.attach(model, method, name, **plan if "rows" not in selection else dict(target_modules=["q_proj"]))
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
