"""The verdict "PEFT: yes" over a zoo of architectures: where it is given, PEFT computes the same function."""

from __future__ import annotations

import copy
import functools
import warnings

import peft_cases as cases
import pytest
import torch
import transformers as T
from torch import nn

import rankloom as rl
from peft import PeftModel

COMMON = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MAMBA = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
JAMBA = {k: v for k, v in COMMON.items() if k != "head_dim"} | {
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip


def _of(model: str, config: str, **settings):
    return functools.partial(lambda: getattr(T, model)(getattr(T, config)(**settings)))


ZOO = {
    "llama": _of("LlamaForCausalLM", "LlamaConfig", **COMMON),
    "gpt2": _of("GPT2LMHeadModel", "GPT2Config", vocab_size=32, n_embd=16, n_layer=2, n_head=2),
    "bert": _of("BertForSequenceClassification", "BertConfig", **COMMON),
    "t5": _of("T5ForConditionalGeneration", "T5Config", vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    "vit": _of("ViTForImageClassification", "ViTConfig", **COMMON, image_size=16, patch_size=8),
    "mixtral": _of("MixtralForCausalLM", "MixtralConfig", **COMMON, num_local_experts=4),
    "qwen2_moe": _of("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **COMMON, **MOE, shared_expert_intermediate_size=8),
    "qwen3_moe": _of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **COMMON, **MOE, mlp_only_layers=[0]),
    "deepseek_v3": _of("DeepseekV3ForCausalLM", "DeepseekV3Config", **{k: v for k, v in COMMON.items() if k != "head_dim"}, **DEEPSEEK),
    "mamba": _of("MambaForCausalLM", "MambaConfig", **MAMBA),
    "mamba2": _of("Mamba2ForCausalLM", "Mamba2Config", **MAMBA, num_heads=4, head_dim=8, n_groups=1),
    "jamba": _of("JambaForCausalLM", "JambaConfig", **JAMBA, use_mamba_kernels=False, mamba_d_state=4, expert_layer_period=2, expert_layer_offset=1),
    "falcon_h1": _of("FalconH1ForCausalLM", "FalconH1Config", **COMMON, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_state=4, mamba_n_groups=1),
}  # fmt: skip
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
ALL = ("all-linear",)
VERDICTS = {
    "llama": [("all-linear", True), (["q_proj", "up_proj"], True), (["embed_tokens"], True)],
    "gpt2": [("all-linear", True), (["mlp.c_proj"], True)],
    "bert": [("all-linear", True), (["query"], True)],
    "t5": [("all-linear", True), (["q", "v"], True)],
    "vit": [("all-linear", True)],
    "mixtral": [("all-linear", True), (["q_proj", "o_proj"], True)],
    "qwen2_moe": [("all-linear", True), (["q_proj"], True), (["shared_expert_gate"], True), ([r"layers\.1\..*q_proj"], True)],
    "qwen3_moe": [("all-linear", False), (["o_proj", "gate_proj"], False), (["v_proj"], True)],
    "deepseek_v3": [("all-linear", False), (["o_proj", "gate_proj", "up_proj", "down_proj"], False), (["o_proj"], True)],
    "mamba": [("all-linear", False), (["in_proj", "x_proj"], True), (["conv1d"], False)],
    "mamba2": [("all-linear", False), (["in_proj"], True)],
    "jamba": [(["in_proj", "out_proj", "q_proj"], True)],
    "falcon_h1": [(["out_proj"], False), (["in_proj", "q_proj"], True)],
}  # fmt: skip
CASES = [(name, targets, verdict) for name, rows in VERDICTS.items() for targets, verdict in rows]


@functools.cache
def base(name):
    torch.manual_seed(5)
    return ZOO[name]().eval()


def answer(model, name):
    inputs = {"pixel_values": PIXELS} if name == "vit" else {"input_ids": IDS}
    if name == "t5":
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model(**inputs).logits


def adapted(name, method, **plan):
    model = copy.deepcopy(base(name))
    bank = rl.attach(model, method, **plan)
    cases.shake((p for _, p, role in bank.tensors("default") if role != "basis"), 0.3)
    return model


def read_alike(model, name, folder):
    """PEFT reads the folder without a word of missing keys, and gives the same logits."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = PeftModel.from_pretrained(copy.deepcopy(base(name)), folder).eval()
    assert not [w for w in said if "missing" in str(w.message)]
    assert float((answer(there, name) - answer(model, name)).abs().max()) < 1e-4


@pytest.mark.parametrize(("name", "targets", "verdict"), CASES, ids=[f"{n}-{t}" for n, t, _ in CASES])
def test_yes_means_the_same_function(name, targets, verdict, tmp_path):
    targets = targets[0] if len(targets) == 1 and "." in targets[0] and "\\" in targets[0] else targets
    targets = f".*{targets}" if isinstance(targets, str) and targets != "all-linear" else targets
    model = adapted(name, rl.LoRA(r=2), target_modules=targets)
    answer(model, name)
    report = rl.save(model, tmp_path / "a")
    assert report.compat.peft.ok == verdict, str(report.compat)
    if verdict:
        read_alike(model, name, tmp_path / "a")
    again = rl.load(copy.deepcopy(base(name)), tmp_path / "a").model
    assert torch.equal(answer(again, name), answer(model, name))


@pytest.mark.parametrize(
    "method", [rl.VeRA(r=4), rl.AdaLoRA(init_r=3, target_r=2), rl.LoHa(r=2)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("name", ["deepseek_v3", "mamba", "falcon_h1"])
def test_other_types_have_other_rules(name, method, tmp_path):
    model = adapted(name, method, target_modules=["gate_proj", "up_proj"] if name == "deepseek_v3" else ["out_proj"])
    report = rl.save(model, tmp_path / "a")
    assert report.compat.peft.ok == (name == "deepseek_v3" or not isinstance(method, rl.AdaLoRA))
    if report.compat.peft.ok:
        read_alike(model, name, tmp_path / "a")


def test_a_parameter_that_is_read_past_its_module(tmp_path):
    model = adapted("mamba", rl.LoRA(r=2), target_modules=[], target_parameters=["dt_proj.weight"])
    answer(model, "mamba")
    report = rl.save(model, tmp_path / "a")
    assert "only where a module is called" in str(report.compat.peft)
    model = adapted("llama", rl.LoRA(r=2), target_modules=[], target_parameters=["v_proj.weight"])
    answer(model, "llama")
    assert model.model.layers[0].self_attn.v_proj.weight is not None
    assert rl.save(model, tmp_path / "b").compat.peft.ok


class Twice(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 4)) if blocks else nn.Linear(4, 4)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def test_a_layer_with_two_names(tmp_path):
    model = Twice(blocks=False)
    rl.attach(model, rl.LoRA(r=2), target_modules=["a", "b"])
    assert "more than one name" in str(rl.save(model, tmp_path / "a").compat.peft)


@pytest.mark.parametrize(
    ("name", "plan", "line"),
    [
        ("llama", {}, "yes"),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "yes"),
        ("mixtral", {}, "yes"),
        ("gpt2", {}, "no (conv1d_transposed targets; it serves no GPT2LMHeadModel with adapters)"),
        ("bert", {}, "no (it serves no BertForSequenceClassification with adapters)"),
    ],
    ids=str,
)
def test_vllm_serves_some_causal_language_models(name, plan, line, tmp_path):
    model = copy.deepcopy(base(name))
    rl.attach(model, rl.LoRA(r=2), **plan)
    assert str(rl.save(model, tmp_path / "a").compat.vllm) == line


def test_vllm_is_told_of_large_ranks(tmp_path):
    model = copy.deepcopy(base("llama"))
    rl.attach(model, rl.LoRA(r=32))
    assert str(rl.save(model, tmp_path / "a").compat.vllm) == "yes (start it with --max-lora-rank 32)"
