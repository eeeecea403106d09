"""Checkpoints of the base, and what a layer shows to the code around it."""

import pytest
import torch
from core_tiny import adapted, difference, llama, nudge, tokens, tower, words
from torch import nn

import rankloom as rl

IDS = words()

LINEAR = {"target_modules": ["q_proj", "v_proj"]}
PLAN = {"target_modules": ["q_proj", "v_proj", "embed"]}


@torch.no_grad()
def test_a_base_checkpoint_loads_into_an_adapted_model():
    model, bank = adapted("a", model=llama(), target_modules="all-linear", modules_to_save=["lm_head"])
    other = llama(initializer_range=0.5)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys
    assert all(".adapters." in key for key in result.missing_keys)
    with bank.using():
        assert torch.equal(model(tokens()).logits, other(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_of_an_adapted_model_loads_into_a_plain_one(tmp_path, merged, tied):
    from transformers import LlamaForCausalLM

    model, bank = adapted("a", model=llama(tie_word_embeddings=tied), method=rl.VeRA(r=3), target_modules="all-linear")
    with bank.using():
        expected = model(tokens()).logits
    if merged:
        expected = model(tokens()).logits
        bank.merge()
    model.save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    assert difference(plain(tokens()).logits, expected) < 1e-12


def test_the_keys_of_the_base_are_unchanged():
    keys = list(tower().state_dict())
    model, _ = adapted("a", **LINEAR, modules_to_save=["head"], trainable_token_indices=[1], bias="all")
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    assert isinstance(model.layers[0].q_proj, nn.Linear)
    assert isinstance(model.head.weight, torch.Tensor)


def test_train_and_eval_reach_the_adapters():
    model = tower().eval()
    bank = rl.attach(model, rl.LoRA(r=2, lora_dropout=0.5), **PLAN)
    nudge(bank)
    assert torch.equal(model(IDS), model(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


def test_hooks_on_an_adapted_layer_see_the_changed_output():
    model, bank = adapted("a")
    layer, seen = model.layers[0].q_proj, []
    layer.register_forward_hook(lambda m, a, y: seen.append((a[0], y)))
    with torch.no_grad():
        model(IDS)
    (x, y), delta = seen[0], bank.delta("a")["layers.0.q_proj"]
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight + delta, layer.bias))


def test_a_layer_called_by_keyword():
    model, _ = adapted("a")
    x = torch.randn(2, 8, dtype=torch.float64)
    layer = model.layers[0].q_proj
    assert torch.equal(layer(input=x), layer(x))


def test_the_print_out_shows_the_graft():
    model, bank = adapted("a")
    assert "GraftedLinear" in repr(model)
    assert "LoRAAdapter(r=2, scaling=1.5)" in repr(model)
    assert repr(bank) == "Bank(adapters=['a'], active=['a'], merged=[])"
