"""Honest folders of other writers must load."""

from __future__ import annotations

import json

import pytest
import torch
from formats_tiny import X, adapted, bare, config, edit_config, edit_tensors, net
from safetensors.torch import load_file, save_file

import rankloom as rl

FULL = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": {"base_model_class": "Net", "parent_library": "x"},
    "base_model_name_or_path": "some/base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": "0.17.0",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def same(folder, model=None, **more):
    expected = adapted()(X)
    model = model or net()
    bank = rl.load(model, folder, **more)
    assert torch.equal(model(X), expected)
    return bank


def test_the_smallest_config(tmp_path):
    model = net()
    bank = rl.attach(model, rl.LoRA(r=8), target_modules=["q"])
    bank.sites("default")[0].adapter.B.data.normal_()
    rl.save(model, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    (tmp_path / "a" / "README.md").unlink()
    (tmp_path / "a" / "adapter_config.json").write_text('{"peft_type":"LORA","target_modules":["q"]}')
    again = net()
    bank = rl.load(again, tmp_path / "a")
    assert torch.equal(again(X), model(X))
    assert bank.plans["default"].method == rl.LoRA(r=8, lora_alpha=8.0)


@pytest.mark.parametrize(
    "change",
    [
        FULL,
        {"target_modules": ...},
        {"target_modules": None},
        {"target_modules": "all-linear", "task_type": "X"},
        {"target_modules": r".*\.(q|v)"},
        {"layers_to_transform": [0, 1], "layers_pattern": ["layers"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"rank_pattern": {"q": 4, "layers.0.v": 4}},
        {"megatron_core": None, "loftq_config": None},
        {"inference_mode": False, "peft_version": "0.4.0"},
        {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
        {"lora_alpha": 6.0},
    ],
    ids=lambda c: json.dumps({k: v for k, v in list(c.items())[:2] if v is not ...}),
)
def test_fields(change, tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, **change)
    same(folder)


def test_unknown_fields_are_named_in_a_warning(tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, zz_new_field=None, zz_switch=False, unsloth_fixed=True)
    with pytest.warns(UserWarning, match="unknown fields are left aside: zz_new_field, zz_switch"):
        same(folder)
    edit_config(folder, zz_new_field=1)
    with pytest.warns(UserWarning, match="unknown fields are left aside: zz_new_field, zz_switch"):
        same(folder, ignore=["zz_new_field"])


def test_a_pattern_that_hits_nothing_is_named_in_a_warning(tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, rank_pattern={"w9": 2})
    with pytest.warns(UserWarning, match="rank_pattern names 'w9', which is no target"):
        bank = same(folder)
    assert bank.plans["default"].rank_pattern == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes(dtype, tmp_path):
    folder = bare(tmp_path / "a")
    edit_tensors(folder, weight=lambda t: t.to(dtype))
    model = net()
    bank = rl.load(model, folder)
    assert all(p.dtype == torch.float32 for _, p, _ in bank.tensors("default"))
    assert float((model(X) - adapted()(X)).detach().abs().max()) < 0.1


def test_extra_files_and_metadata(tmp_path):
    folder = bare(tmp_path / "a")
    for name in ("optimizer.pt", "training_args.bin", "tokenizer.json", ".gitattributes"):
        (folder / name).write_bytes(b"\x80\x04whatever")
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": "x"})
    same(folder)


def test_a_base_tensor_that_equals_the_base_is_read_over(tmp_path):
    folder = bare(tmp_path / "a")
    edit_tensors(folder, **{"base_model.model.score.weight": net().score.weight.data.clone()})
    same(folder)


def test_the_wording_of_targets_is_kept(tmp_path):
    folder = bare(tmp_path / "a", target_modules=r"layers\.\d\.(q|v)")
    assert config(folder)["target_modules"] == r"layers\.\d\.(q|v)"
    bank = same(folder)
    assert bank.plans["default"].target_modules == r"layers\.\d\.(q|v)"
    rl.save(bank.model, tmp_path / "b")
    assert config(tmp_path / "b") == config(folder)


def test_a_second_save_of_a_foreign_folder_is_the_same_folder(tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, **FULL)
    bank = same(folder)
    rl.save(bank.model, tmp_path / "b")
    first, second = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert config(tmp_path / "b") == {
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q", "v"],
    }
