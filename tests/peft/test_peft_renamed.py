"""Files of older versions of transformers name the modules of models with several modalities otherwise."""

from __future__ import annotations

import copy
import functools
import json
import warnings

import peft_cases as cases
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file

import rankloom as rl
from peft import LoraConfig, PeftModel, get_peft_model

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def llava():
    vision = {**SMALL, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 16}
    text = {**SMALL, "model_type": "llama", "num_key_value_heads": 2, "vocab_size": 32}
    return T.LlavaForConditionalGeneration(T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=31))


OLD = (
    ("base_model.model.model.language_model.", "base_model.model.language_model.model."),
    ("base_model.model.model.vision_tower.", "base_model.model.vision_tower."),
    ("base_model.model.lm_head", "base_model.model.language_model.lm_head"),
)


@functools.cache
def base():
    torch.manual_seed(3)
    return llava().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def older(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for new, old in OLD:
        tensors = {key.replace(new, old, 1) if key.startswith(new) else key: value for key, value in tensors.items()}
    save_file(tensors, path)


def made(folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = get_peft_model(copy.deepcopy(base()), LoraConfig(r=2, **settings)).eval()
        cases.shake(p for p in there.parameters() if p.requires_grad)
        there.save_pretrained(folder)
    return logits(there)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": r".*language_model.*\.(q|v)_proj"},
    ],
    ids=str,
)
def test_old_names_are_read_as_todays(settings, tmp_path):
    expected = made(tmp_path / "a", **settings)
    older(tmp_path / "a")
    assert any(k.startswith("base_model.model.language_model.") for k in cases.keys_of(tmp_path / "a"))
    model = copy.deepcopy(base())
    rl.load(model, tmp_path / "a")
    assert float((logits(model) - expected).abs().max()) < 1e-5
    rl.save(model, tmp_path / "b")
    assert not any(k.startswith("base_model.model.language_model.") for k in cases.keys_of(tmp_path / "b"))
    there = PeftModel.from_pretrained(copy.deepcopy(base()), tmp_path / "b").eval()
    assert float((logits(there) - expected).abs().max()) < 1e-5


def test_whole_names_in_the_config_are_renamed_too(tmp_path):
    name = "model.language_model.layers.1.self_attn.q_proj"
    expected = made(tmp_path / "a", target_modules=[name])
    older(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "target_modules": ["language_model.model.layers.1.self_attn.q_proj"]}))
    model = copy.deepcopy(base())
    bank = rl.load(model, tmp_path / "a")
    assert bank.plans["default"].target_modules == (name,)
    assert float((logits(model) - expected).abs().max()) < 1e-5


def test_a_name_that_no_version_had_is_refused_as_before(tmp_path):
    made(tmp_path / "a", target_modules=["q_proj"])
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k.replace("layers.1", "layers.7"): v for k, v in load_file(path).items()}, path)
    with pytest.raises(rl.RankloomError, match=r"layers\.7\.self_attn\.q_proj', which this model has not"):
        rl.load(copy.deepcopy(base()), tmp_path / "a")
