"""Tiny models and the table of cases in which PEFT and this library must compute the same, both ways."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import nn

import rankloom as rl
from peft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.bn(self.lin(x)))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(6, 9, 3, padding=1, groups=3)
        self.three = nn.Conv3d(1, 2, (1, 3, 3), padding=(0, 1, 1))
        self.head = nn.Linear(18, 5)

    def forward(self, x):
        h = torch.relu(self.one(x)).unsqueeze(2).repeat(1, 1, 4, 1)
        h = torch.relu(self.two(h))
        h = torch.relu(self.grouped(torch.relu(self.point(h))))
        h = self.three(h.unsqueeze(1)).mean((3, 4)).flatten(1)
        return self.head(h)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.lin = nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.norm(self.lin(self.attn(x, x, x, need_weights=False)[0])))


class Experts(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(3, *((8, 12) if transposed else (12, 8))) * 0.3)
        self.router = nn.Linear(8, 8)
        self.down = nn.Parameter(torch.randn(3, *((12, 8) if transposed else (8, 12))) * 0.3)

    def forward(self, x):
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return (torch.relu(self.router(x) @ up) @ down).sum(0)


class Stack(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 8)
        self.experts = Experts(transposed)
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.experts(self.inp(x)))


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "vocab_size": 29, "max_position_embeddings": 32, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def classifier() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=29, pad_token_id=0
    )
    config.num_labels = 3
    return LlamaForSequenceClassification(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=29, n_positions=32))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=29,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "llama": (llama, lambda: {"input_ids": TOKENS}),
    "tied": (functools.partial(llama, tie_word_embeddings=True), lambda: {"input_ids": TOKENS}),
    "classifier": (classifier, lambda: {"input_ids": TOKENS}),
    "gpt2": (gpt2, lambda: {"input_ids": TOKENS}),
    "mixtral": (mixtral, lambda: {"input_ids": TOKENS}),
    "conv": (ConvNet, lambda: {"x": torch.linspace(-1, 1, 64).reshape(2, 4, 8).sin()}),
    "attention": (Attention, lambda: {"x": torch.linspace(-2, 2, 160).reshape(2, 5, 16).cos()}),
    "experts": (Stack, lambda: {"x": torch.linspace(-2, 2, 40).reshape(5, 8)}),
    "norms": (Norms, lambda: {"x": torch.linspace(-2, 2, 40).reshape(5, 8)}),
    "transposed": (functools.partial(Stack, True), lambda: {"x": torch.linspace(-2, 2, 40).reshape(5, 8)}),
}


@functools.cache
def base(name: str) -> nn.Module:
    torch.manual_seed(7)
    model = MODELS[name][0]().eval()
    for n, p in model.named_parameters():
        if n.endswith("bias"):
            p.data.normal_(std=0.1)
    return model


def fresh(name: str) -> nn.Module:
    return copy.deepcopy(base(name))


def run(name: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(**MODELS[name][1]())
    return getattr(out, "logits", out)


def shake(tensors, size: float = 0.2, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor.data.add_(torch.randn(tensor.shape, generator=generator) * size)


@dataclass(frozen=True)
class Case:
    """One row: a model, our method and plan settings, and PEFT's config of the same function."""

    id: str
    model: str
    method: Callable[[], Any]
    plan: Mapping[str, Any]
    peft: Callable[[], Any]
    ways: frozenset[str] = frozenset({"to", "from"})
    prune: bool = False
    size: float = 0.2
    base_keys: bool = False
    """PEFT also writes the embedding itself."""


TO, FROM = frozenset({"to"}), frozenset({"from"})
Q_V = ["q_proj", "v_proj"]
QV = {"target_modules": ["q_proj", "v_proj"]}


def lora(*targets: str, **settings: Any) -> Callable[[], LoraConfig]:
    return lambda: LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(targets), **settings})


def ours(**settings: Any) -> Callable[[], rl.LoRA]:
    return lambda: rl.LoRA(**{"r": 4, "lora_alpha": 6.0, **settings})


def case(id_: str, model: str, method: Any, plan: Mapping[str, Any], peft: Any, **more: Any) -> Case:
    return Case(id_, model, method, plan, peft, **more)


CONVS = ["one", "two", "point", "three"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
REGEX = r".*self_attn\.(q|o)_proj"
CASES = [
    case("lora-linear", "llama", ours(), QV, lora(*Q_V)),
    case("lora-regex", "llama", ours(), {"target_modules": REGEX}, lambda: LoraConfig(r=4, lora_alpha=6, target_modules=REGEX)),
    case("lora-exclude", "llama", ours(), {**QV, "exclude_modules": ["layers.0.self_attn.q_proj"]}, lora(*Q_V, exclude_modules=["layers.0.self_attn.q_proj"])),
    case("lora-layers", "llama", ours(), {**QV, "layers_to_transform": [1], "layers_pattern": "layers"}, lora(*Q_V, layers_to_transform=[1], layers_pattern="layers")),
    case("rslora-patterns", "llama", ours(scaling="rslora"), {**QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*v_proj": 9}}, lora(*Q_V, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*v_proj": 9})),
    case("lora-bias", "llama", ours(lora_bias=True), QV, lora(*Q_V, lora_bias=True)),
    case("bias-all", "llama", ours(), {**QV, "bias": "all"}, lora(*Q_V, bias="all")),
    case("bias-lora-only", "llama", ours(), {**QV, "bias": "lora_only"}, lora(*Q_V, bias="lora_only")),
    case("dora-linear", "llama", lambda: rl.DoRA(rl.LoRA(r=4, lora_alpha=6.0)), QV, lora(*Q_V, use_dora=True)),
    case("lora-conv1d", "gpt2", ours(), {"target_modules": ["c_attn", "c_proj"]}, lora("c_attn", "c_proj", fan_in_fan_out=True)),
    case("dora-conv1d", "gpt2", lambda: rl.DoRA(rl.LoRA(r=4, lora_alpha=6.0)), {"target_modules": ["c_attn"]}, lora("c_attn", fan_in_fan_out=True, use_dora=True)),
    case("lora-embedding", "llama", ours(), {"target_modules": ["embed_tokens", "q_proj"]}, lora("embed_tokens", "q_proj"), base_keys=True),
    case("dora-embedding", "llama", lambda: rl.DoRA(rl.LoRA(r=4, lora_alpha=6.0)), {"target_modules": ["embed_tokens"]}, lora("embed_tokens", use_dora=True), base_keys=True),
    case("lora-convs", "conv", ours(), {"target_modules": CONVS}, lora(*CONVS)),
    case("lora-bias-convs", "conv", ours(lora_bias=True), {"target_modules": CONVS}, lora(*CONVS, lora_bias=True)),
    case("dora-convs", "conv", lambda: rl.DoRA(rl.LoRA(r=4, lora_alpha=6.0)), {"target_modules": CONVS}, lora(*CONVS, use_dora=True)),
    case("lora-experts", "mixtral", ours(), {"target_modules": ["q_proj"], "target_parameters": EXPERTS}, lora("q_proj", target_parameters=EXPERTS)),
    case("lora-experts-only", "experts", ours(), {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}, lora(target_parameters=["experts.up", "experts.down"])),
    case("lora-experts-transposed", "transposed", ours(), {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}, lora(target_parameters=["experts.up", "experts.down"])),
    case("lora-parameter-2d", "llama", ours(), {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]}, lora("q_proj", target_parameters=["v_proj.weight"])),
    case("lora-attention", "attention", ours(), {"target_modules": ["attn", "lin"]}, lora("attn", "lin")),
    case("lora-experts-nested", "experts", ours(), {"target_modules": ["router", "inp"], "target_parameters": ["experts.up"]}, lora("router", "inp", target_parameters=["experts.up"])),
    case("lora-all-linear", "llama", ours(), {}, lambda: LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")),
    case("lora-grouped-conv", "conv", lambda: rl.LoRA(r=2, lora_alpha=6.0), {"target_modules": ["grouped", "two"]}, lora("grouped", "two", r=2, rank_pattern={"grouped": 6}, alpha_pattern={"grouped": 18}), ways=TO),
    case("rslora-grouped-conv", "conv", lambda: rl.LoRA(r=2, lora_alpha=6.0, scaling="rslora"), {"target_modules": ["grouped", "two"]}, lora("grouped", "two", r=2, rank_pattern={"grouped": 6}), ways=TO),
    case("lora-gaussian-dropout", "llama", ours(init_lora_weights="gaussian", lora_dropout=0.1), QV, lora(*Q_V, init_lora_weights="gaussian", lora_dropout=0.1)),
    case("pissa", "llama", ours(init_lora_weights="pissa"), QV, lora(*Q_V, init_lora_weights="pissa")),
    case("dora-pissa", "llama", lambda: rl.DoRA(rl.LoRA(r=4, lora_alpha=6.0, init_lora_weights="pissa")), QV, lora(*Q_V, use_dora=True, init_lora_weights="pissa"), ways=TO),
    case("lora-fa", "llama", lambda: rl.lora_fa(r=4, lora_alpha=6.0), QV, lora(*Q_V)),
    case("asymmetric-lora", "llama", lambda: rl.AsymmetricLoRA(r=4, lora_alpha=6.0), QV, lora(*Q_V)),
    case("asymmetric-lora-residual", "llama", lambda: rl.AsymmetricLoRA(r=4, lora_alpha=6.0, init_B="rand"), QV, lora(*Q_V, r=8, lora_alpha=12), ways=TO),
    case("modules-to-save-batchnorm", "norms", ours(), {"target_modules": ["lin"], "modules_to_save": ["bn"]}, lora("lin", modules_to_save=["bn"])),
    case("modules-to-save-score", "classifier", ours(), {**QV, "modules_to_save": ["score"]}, lora(*Q_V, modules_to_save=["score"], task_type="SEQ_CLS")),
    case("modules-to-save-norm", "llama", ours(), {**QV, "modules_to_save": ["norm"]}, lora(*Q_V, modules_to_save=["model.norm"])),
    case("modules-to-save-layernorm", "gpt2", ours(), {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}, lora("c_attn", modules_to_save=["ln_f"], fan_in_fan_out=True)),
    case("token-rows", "llama", ours(), {**QV, "trainable_token_indices": [3, 1, 8]}, lora(*Q_V, trainable_token_indices=[3, 1, 8])),
    case("token-rows-tied", "tied", ours(), {**QV, "trainable_token_indices": {"embed_tokens": [3, 1, 8]}}, lora(*Q_V, trainable_token_indices={"embed_tokens": [3, 1, 8]})),
    case("layer-replication", "llama", ours(), {**QV, "layer_replication": [[0, 2], [1, 2]]}, lora(*Q_V, layer_replication=[[0, 2], [1, 2]])),
    case("adalora", "llama", lambda: rl.AdaLoRA(init_r=4, target_r=2, lora_alpha=6.0), QV, lambda: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=Q_V, total_step=10), size=0.6),
    case("adalora-pruned", "llama", lambda: rl.AdaLoRA(init_r=4, target_r=2, lora_alpha=6.0), QV, lambda: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=Q_V, total_step=10), prune=True, size=0.6),
    case("adalora-conv1d", "gpt2", lambda: rl.AdaLoRA(init_r=4, target_r=2, lora_alpha=6.0), {"target_modules": ["c_attn"]}, lambda: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["c_attn"], total_step=10, fan_in_fan_out=True), size=0.6),
    case("adalora-conv2d", "conv", lambda: rl.AdaLoRA(init_r=4, target_r=2, lora_alpha=6.0), {"target_modules": ["two"]}, lambda: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["two"], total_step=10), size=0.6),
    case("vera", "llama", lambda: rl.VeRA(r=8, projection_prng_key=5), {"target_modules": ["q_proj", "down_proj"]}, lambda: VeraConfig(r=8, projection_prng_key=5, target_modules=["q_proj", "down_proj"]), size=0.6),
    case("vera-no-projection", "llama", lambda: rl.VeRA(r=8, projection_prng_key=5, save_projection=False), QV, lambda: VeraConfig(r=8, projection_prng_key=5, save_projection=False, target_modules=Q_V), size=0.6),
    case("vera-conv1d-bias", "gpt2", lambda: rl.VeRA(r=8), {"target_modules": ["c_attn"], "bias": "lora_only"}, lambda: VeraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, bias="vera_only"), size=0.6),
    case("loha", "llama", lambda: rl.LoHa(r=3, lora_alpha=6.0, rank_dropout=0.1), {**QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, lambda: LoHaConfig(r=3, alpha=6, rank_dropout=0.1, target_modules=Q_V, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), size=0.4),
    case("loha-convs", "conv", lambda: rl.LoHa(r=3), {"target_modules": ["one", "two", "point", "grouped", "head"]}, lambda: LoHaConfig(r=3, target_modules=["one", "two", "point", "grouped", "head"])),
    case("loha-conv-cores", "conv", lambda: rl.LoHa(r=3, use_effective_conv2d=True), {"target_modules": ["one", "two", "point", "grouped"]}, lambda: LoHaConfig(r=3, use_effective_conv2d=True, target_modules=["one", "two", "point", "grouped"]), size=0.45),
    case("lokr", "llama", lambda: rl.LoKr(r=1, lora_alpha=3.0, decompose_both=True), {"exclude_modules": ["down_proj"]}, lambda: LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules="all-linear", exclude_modules=["down_proj"]), size=0.4),
    case("lokr-whole", "llama", lambda: rl.LoKr(decompose_factor=3, init_weights="lycoris", module_dropout=0.2), {**QV, "layers_to_transform": [1]}, lambda: LoKrConfig(decompose_factor=3, init_weights="lycoris", module_dropout=0.2, target_modules=Q_V, layers_to_transform=[1])),
    case("lokr-convs", "conv", lambda: rl.LoKr(r=1), {"target_modules": ["one", "two", "point", "grouped"], "rank_pattern": {"two": 8}}, lambda: LoKrConfig(r=1, target_modules=["one", "two", "point", "grouped"], rank_pattern={"two": 8}), size=0.4),
    case("lokr-conv-cores", "conv", lambda: rl.LoKr(r=1, use_effective_conv2d=True, decompose_factor=2, rank_dropout=0.1, rank_dropout_scale=True), {"target_modules": ["two", "point", "grouped"]}, lambda: LoKrConfig(r=1, use_effective_conv2d=True, decompose_factor=2, rank_dropout=0.1, rank_dropout_scale=True, target_modules=["two", "point", "grouped"]), size=0.8),
    case("hira", "llama", lambda: rl.HiRA(r=3, hira_dropout=0.1), {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}, lambda: HiraConfig(r=3, hira_dropout=0.1, target_modules=["q_proj", "v_proj", "embed_tokens"]), size=0.6, base_keys=True),
    case("hira-conv1d", "gpt2", lambda: rl.HiRA(r=3, init_weights="gaussian"), {"target_modules": ["c_attn"]}, lambda: HiraConfig(r=3, init_weights="gaussian", target_modules=["c_attn"], fan_in_fan_out=True), size=0.6),
    case("hira-convs", "conv", lambda: rl.HiRA(r=3), {"target_modules": CONVS}, lambda: HiraConfig(r=3, target_modules=CONVS), size=0.6),
    case("ia3", "llama", lambda: rl.IA3(("down_proj",)), {"target_modules": ["k_proj", "v_proj", "down_proj"]}, lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    case("ia3-all-linear", "llama", lambda: rl.IA3(("up_proj",)), {}, lambda: IA3Config(target_modules="all-linear", feedforward_modules=["up_proj"]), ways=TO),
    case("ia3-conv1d", "gpt2", lambda: rl.IA3(("mlp.c_proj",)), {"target_modules": ["c_attn", "mlp.c_proj"]}, lambda: IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
    case("ia3-convs", "conv", lambda: rl.IA3(("two", "grouped", "three")), {"target_modules": ["two", "point", "grouped", "three"]}, lambda: IA3Config(target_modules=["two", "point", "grouped", "three"], feedforward_modules=["two", "grouped", "three"]), size=0.4),
]  # fmt: skip


def ours_adapted(one: Case) -> nn.Module:
    """Our adapted model with shaken, so non-zero, tensors."""
    model = fresh(one.model)
    bank = rl.attach(model, one.method(), **one.plan)
    shake((p for _, p, role in bank.tensors("default") if role != "basis"), one.size)
    if one.prune:
        _prune_ours(bank)
    return model


def peft_adapted(one: Case) -> PeftModel:
    """PEFT's adapted model with shaken tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(fresh(one.model), one.peft()).eval()
    shake((p for p in model.parameters() if p.requires_grad), one.size)
    if one.prune:
        _prune_peft(model)
    return model


def _prune_ours(bank: Any) -> None:
    for position, (_, adapter) in enumerate(bank.adapters("default")):
        adapter.E.data[position % 3 :: 2] = 0


def _prune_peft(model: PeftModel) -> None:
    """What PEFT's rank allocation leaves behind: zeroed values, and the pattern of the kept ones in the config."""
    pattern = {}
    for position, (name, parameter) in enumerate(
        (n, p) for n, p in model.base_model.model.named_parameters() if "lora_E" in n
    ):
        parameter.data[position % 3 :: 2] = 0
        pattern[name] = (parameter.data != 0).flatten().tolist()
    model.peft_config["default"].rank_pattern = pattern


def load_in_peft(one: Case, folder: Path) -> tuple[PeftModel, Any, list[str]]:
    """(model, load result, warnings) of PEFT reading a folder."""
    results = []
    original = PeftModel.load_adapter

    def spy(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        results.append(result)
        return result

    with warnings.catch_warnings(record=True) as caught, mock.patch.object(PeftModel, "load_adapter", spy):
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(fresh(one.model), folder).eval()
    return model, results[0], [str(w.message) for w in caught]


def keys_of(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def to_peft(one: Case) -> float:
    """Largest difference of PEFT's logits after reading our folder."""
    with tempfile.TemporaryDirectory() as place:
        model = ours_adapted(one)
        rl.save(model, Path(place) / "a")
        there = load_in_peft(one, Path(place) / "a")[0]
        return float((run(one.model, model) - run(one.model, there)).abs().max())


def from_peft(one: Case) -> float:
    """Largest difference of our logits after reading PEFT's folder."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft_adapted(one)
        expected = run(one.model, there)
        there.save_pretrained(Path(place) / "a")
        model = fresh(one.model)
        rl.load(model, Path(place) / "a")
        return float((run(one.model, model) - expected).abs().max())
