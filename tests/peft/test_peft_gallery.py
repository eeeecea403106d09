"""Row 1's counterweight: a gallery of honest folders, as PEFT of many versions and its users write them, must load."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
import torch
from peft.utils import PeftType
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import rankloom as rl
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
from rankloom.formats.manifest import CONFIG, WEIGHTS

IDS = torch.arange(3, 27).reshape(2, 12)
TARGETS = ["q_proj", "v_proj"]


def base():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, attention_bias=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def lora(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})


CONFIGS = {
    "plain": lora(),
    "task type": lora(task_type="CAUSAL_LM"),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "bias all": lora(bias="all"),
    "bias lora_only": lora(bias="lora_only"),
    "lora_bias": lora(lora_bias=True),
    "dropout": lora(lora_dropout=0.1),
    "gaussian": lora(init_lora_weights="gaussian"),
    "no init": lora(init_lora_weights=False),
    "all-linear": lora(target_modules="all-linear", task_type="CAUSAL_LM"),
    "a regular expression": lora(target_modules=r".*layers\.\d\.self_attn\.(q|v)_proj"),
    "full names": lora(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]),
    "excluded": lora(target_modules=["q_proj", "k_proj"], exclude_modules=["model.layers.0.self_attn.k_proj"]),
    "blocks": lora(layers_to_transform=[1]),
    "one block": lora(layers_to_transform=0, layers_pattern="layers"),
    "rank_pattern": lora(rank_pattern={"v_proj": 2}),
    "alpha_pattern": lora(alpha_pattern={"v_proj": 3}),
    "exact patterns": lora(rank_pattern={"^model.layers.0.self_attn.q_proj": 2}, alpha_pattern={"layers.1.*v_proj": 2}),
    "head saved": lora(modules_to_save=["lm_head"]),
    "norm saved": lora(modules_to_save=["norm"]),
    "embedding saved": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "embedding adapted": lora(target_modules=["q_proj", "embed_tokens"]),
    "tokens": lora(trainable_token_indices=[1, 5]),
    "tokens by name": lora(trainable_token_indices={"embed_tokens": [2, 3]}),
    "parameters": lora(target_modules=[], target_parameters=["mlp.up_proj.weight"]),
    "replicated": lora(layer_replication=[[0, 2], [1, 2]]),
    "rank 1": lora(r=1),
    "a fraction of alpha": lora(lora_alpha=0.5),
    "negative alpha": lora(lora_alpha=-4),
    "revision": lora(revision="main"),
    "vera": VeraConfig(r=4, target_modules=TARGETS),
    "vera without projection": VeraConfig(r=4, target_modules=TARGETS, save_projection=False),
    "adalora": AdaLoraConfig(target_r=2, init_r=4, total_step=10, target_modules=TARGETS),
}
OLD = {
    "0.2": "base_model_name_or_path bias fan_in_fan_out inference_mode lora_alpha lora_dropout modules_to_save peft_type r "
    "target_modules task_type",
    "0.4": "init_lora_weights layers_pattern layers_to_transform revision auto_mapping",
    "0.6": "alpha_pattern rank_pattern",
    "0.8": "loftq_config megatron_config megatron_core use_rslora",
    "0.10": "use_dora layer_replication",
    "0.14": "eva_config exclude_modules lora_bias",
    "0.16": "corda_config trainable_token_indices peft_version qalora_group_size use_qalora target_parameters",
}


def made(config, folder, monkeypatch=None):
    """(PEFT's answer, its folder): every trained tensor random."""
    model = get_peft_model(base(), copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        answer = model(IDS).logits
    model.save_pretrained(folder)
    return answer


def loads(folder, answer, tolerance=1e-5):
    model = base()
    rl.load(model, folder)
    with torch.no_grad():
        assert float((model(IDS).logits - answer).abs().max()) <= tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_writes(name, tmp_path):
    loads(tmp_path / "a", made(CONFIGS[name], tmp_path / "a"))


@pytest.mark.parametrize("version", OLD)
def test_older_versions_know_fewer_fields(version, tmp_path):
    answer = made(lora(), tmp_path / "a")
    known: set[str] = set()
    for each, names in OLD.items():
        known |= set(names.split())
        if each == version:
            break
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k in known}))
    loads(tmp_path / "a", answer)


def a_newer_version(folder):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_quux": False, "quux_config": None, "quux": {}}))


def unsloth(folder):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "unsloth_fixed": True}))


def files_of_a_trainer(folder):
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "trainer_state.json",
        "merges.txt",
    ):
        (folder / name).write_bytes(b"\x80\x04.")
    (folder / "checkpoint-3").mkdir()


def no_card(folder):
    (folder / "README.md").unlink()


def metadata(folder):
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt", "author": "me"})


def cast(dtype):
    def change(folder):
        save_file({k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)

    return change


def read_only(folder):
    for path in folder.iterdir():
        path.chmod(0o444)


def linked_folder(folder):
    folder.rename(folder.with_name("real"))
    folder.symlink_to("real")


def hub_cache(at):
    def change(folder):
        home = folder.with_name("models--me--x")
        (home / "blobs").mkdir(parents=True)
        snapshot = home / at
        snapshot.mkdir(parents=True)
        for path in folder.iterdir():
            shutil.move(path, home / "blobs" / path.name)
            (snapshot / path.name).symlink_to(os.path.relpath(home / "blobs" / path.name, snapshot))
        folder.rmdir()
        folder.symlink_to(snapshot)

    return change


def the_base_copied_in(folder):
    """PEFT saves an embedding that it believes to be resized, though nothing trained it."""
    tensors = load_file(folder / WEIGHTS)
    weight = base().model.embed_tokens.weight.data.clone()
    save_file({**tensors, "base_model.model.model.embed_tokens.weight": weight}, folder / WEIGHTS)


SHAPES = {
    "a newer version": (a_newer_version, 1e-5),
    "unsloth": (unsloth, 1e-5),
    "files of a trainer": (files_of_a_trainer, 1e-5),
    "no card": (no_card, 1e-5),
    "metadata": (metadata, 1e-5),
    "F16": (cast(torch.float16), 1e-2),
    "BF16": (cast(torch.bfloat16), 5e-2),
    "F64": (cast(torch.float64), 1e-5),
    "F8": (cast(torch.float8_e4m3fn), 0.5),
    "read-only": (read_only, 1e-5),
    "a linked folder": (linked_folder, 1e-5),
    "hub cache": (hub_cache("snapshots/abc"), 1e-5),
    "hub cache, subfolder": (hub_cache("snapshots/abc/best"), 1e-5),
    "the base's embedding copied in": (the_base_copied_in, 1e-5),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_folders(name, tmp_path):
    answer = made(lora(), tmp_path / "a")
    change, tolerance = SHAPES[name]
    change(tmp_path / "a")
    loads(tmp_path / "a", answer, tolerance)


def test_the_gallery_is_large():
    assert len(CONFIGS) + len(OLD) + len(SHAPES) >= 50
    assert {PeftType(c.peft_type).value for c in CONFIGS.values()} == {"LORA", "VERA", "ADALORA"}
