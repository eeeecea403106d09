"""Experts in stacked parameters: a real (tiny) Mixtral under every experts implementation that runs here."""

import pytest
import torch
from core_tiny import assert_lives, difference, nudge

import rankloom as rl


def mixtral(implementation="eager"):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        attn_implementation="eager", experts_implementation=implementation,
    )  # fmt: skip
    return MixtralForCausalLM(config).float().eval()


IDS = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("method", [rl.LoRA(r=2, lora_alpha=4), rl.DoRA(rl.LoRA(r=2))], ids=["lora", "dora"])
def test_mixtral_experts(implementation, method):
    model = mixtral(implementation)
    assert_lives(model, lambda m: m(IDS).logits, method, tolerance=2e-5, **EXPERTS)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_experts_implementation_gives_the_same_answer(implementation):
    outputs = []
    for name in ("eager", implementation):
        model = mixtral(name)
        nudge(rl.attach(model, rl.LoRA(r=2, lora_alpha=4), **EXPERTS))
        outputs.append(model(IDS).logits.detach())
    assert difference(*outputs) < 1e-5


def test_experts_beside_attention_layers_and_generation():
    model = mixtral()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"], target_parameters=["gate_up_proj"])
    assert [f.name for f in bank.sites("default")] == [
        *(f"model.layers.{i}.self_attn.q_proj" for i in range(2)),
        *(f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)),
    ]
    nudge(bank)
    spoken = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    bank.merge()
    assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), spoken)


def test_every_expert_gets_its_gradient():
    model = mixtral()
    bank = rl.attach(model, rl.LoRA(r=2), **EXPERTS)
    nudge(bank)
    ids = torch.randint(0, 32, (4, 16))
    model(ids, labels=ids).loss.backward()
    for _, parameter, _ in bank.trainable():
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).all()


def test_the_change_of_the_experts_is_computed_once_in_a_forward():
    model = mixtral("eager")
    bank = rl.attach(model, rl.LoRA(r=2), **EXPERTS)
    counts = {}
    for site, adapter in bank.adapters():

        def forward(x, y, base, site=site, original=adapter.forward):
            counts[site] = counts.get(site, 0) + 1
            return original(x, y, base)

        adapter.forward = forward
    model(IDS)
    assert set(counts.values()) == {1}
    assert len(counts) == 4


def test_rows_are_refused_at_a_parameter():
    model = mixtral()
    bank = rl.attach(model, rl.LoRA(r=2), **EXPERTS)
    bank.use(rows=["default", None])
    with pytest.raises(rl.RankloomError, match="same for all rows"):
        model(IDS)
