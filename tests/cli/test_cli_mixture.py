"""The plan of a mixture of experts: what is reached, what is not, and what a step takes, as in a real pass."""

import pytest
import torch
from cli_tiny import byte_tokenizer
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import rankloom as rl
from rankloom.hf.models import load_model
from rankloom.jobs import plan as planning
from rankloom.jobs.plan import saved_bytes
from rankloom.train.config import ModelSettings

SIZES = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
KINDS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8)
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def mixture(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtures") / request.param
    torch.manual_seed(0)
    KINDS[request.param]().save_pretrained(folder)
    byte_tokenizer(eos_token="<e>", pad_token="<p>").save_pretrained(folder)
    return folder


def test_experts_are_told_and_the_activations_are_those_of_a_real_pass(run, mixture):
    found = run("plan", f"model={mixture}", "r=2", "--json")
    assert found.code == 0, found.err
    assert "fake_tensor" not in found.err
    assert "Traceback" not in found.err
    names = [f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")]
    assert found.json["stacked"] == names
    [note] = [n for n in found.json["notes"] if "stacked" in n]
    assert "target_parameters=[gate_up_proj, down_proj]" in note
    assert "14 of 14" not in note
    loaded = load_model(ModelSettings(str(mixture)))
    rl.attach(loaded.model, rl.LoRA(r=2))
    memory = found.json["memory"]
    ids = torch.zeros(memory["rows"], memory["length"], dtype=torch.long)
    real = saved_bytes(loaded.model.train(), {"input_ids": ids, "labels": ids})
    assert memory["activations"] == pytest.approx(real, rel=0.03)


def test_what_the_note_says_reaches_them(run, mixture):
    found = run("plan", f"model={mixture}", "r=2", "target_parameters=[gate_up_proj, down_proj]", "--json")
    assert found.json["stacked"] == []
    assert sum("experts" in site["name"] for site in found.json["sites"]) == 4
    assert found.json["memory"]["activations"] > 0
    shown = run("plan", f"model={mixture}", "r=2").out
    assert "2 × model.layers.*.mlp.experts.gate_up_proj" in shown


def test_what_cannot_be_followed_makes_the_total_a_lower_bound(run, model, monkeypatch):
    def fails(*args):
        raise RuntimeError("no meta for this")

    monkeypatch.setattr(planning, "saved_bytes", fails)
    found = run("plan", f"model={model}", "r=2")
    assert found.code == 0
    assert "at least" in found.out
    assert "cannot be traced: RuntimeError: no meta for this" in found.out
    assert "fused in training" not in found.out
    assert found.err == ""
