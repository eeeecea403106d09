"""Files of models whose vocabulary was made larger: PEFT writes the embeddings, whose new rows every process draws anew."""

from __future__ import annotations

import copy
import json
import warnings

import peft_cases as cases
import pytest
import torch
from safetensors.torch import load_file, save_file

import rankloom as rl
from peft import LoraConfig, PeftModel, get_peft_model


@pytest.fixture(autouse=True)
def _peft_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def larger(seed, model="llama"):
    made = cases.fresh(model)
    torch.manual_seed(seed)
    made.resize_token_embeddings(33, mean_resizing=False)
    return made


def saved(folder, model="llama", **settings):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    there = get_peft_model(larger(1, model), config).eval()
    cases.shake(p for p in there.parameters() if p.requires_grad)
    there.save_pretrained(folder, save_embedding_layers=True)
    return cases.run(model, there)


def off(model, name, logits):
    return float((cases.run(name, model) - logits).abs().max())


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_taken_whole_they_give_pefts_function(name, tmp_path):
    logits = saved(tmp_path / "a", name)
    there = PeftModel.from_pretrained(larger(2, name), tmp_path / "a").eval()
    assert float((cases.run(name, there) - logits).abs().max()) < 1e-5
    model = larger(3, name)
    before = copy.deepcopy(model.state_dict())
    bank = rl.load(model, tmp_path / "a", full_tensors="take")
    assert off(model, name, logits) < 1e-5
    assert bank.plans["default"].modules_to_save == ("lm_head", "model.embed_tokens")
    rl.save(model, tmp_path / "b")
    assert off(rl.load(larger(4, name), tmp_path / "b").model, name, logits) < 1e-5
    back = PeftModel.from_pretrained(larger(5, name), tmp_path / "b").eval()
    assert float((cases.run(name, back) - logits).abs().max()) < 1e-5
    rl.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_by_default_the_message_names_rows_and_remedy(tmp_path):
    saved(tmp_path / "a")
    model = larger(2)
    with pytest.raises(rl.RankloomError, match=r"lm_head.weight' holds .*rows 29 to 32 of 33.*full_tensors='take'"):
        rl.load(model, tmp_path / "a")
    assert not hasattr(model, "rankloom")
    with pytest.raises(rl.RankloomError, match="full_tensors='all': expected one of"):
        rl.load(model, tmp_path / "a", full_tensors="all")


def test_where_the_base_is_the_same_nothing_is_trained_whole(tmp_path):
    logits = saved(tmp_path / "a")
    model = larger(1)
    bank = rl.load(model, tmp_path / "a", full_tensors="take")
    assert off(model, "llama", logits) < 1e-5
    assert bank.plans["default"].modules_to_save == ()


def test_an_embedding_that_is_adapted_too_is_copied_into_the_model_first(tmp_path):
    saved(tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    there = PeftModel.from_pretrained(larger(2), tmp_path / "a").eval()
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    model = larger(2)
    with pytest.raises(rl.RankloomError, match=r"model\.model\.embed_tokens\.weight\.data\.copy_"):
        rl.load(model, tmp_path / "a", full_tensors="take")
    model.model.embed_tokens.weight.data.copy_(tensors["base_model.model.model.embed_tokens.base_layer.weight"])
    rl.load(model, tmp_path / "a", full_tensors="take")
    assert off(model, "llama", cases.run("llama", there)) < 1e-5


def test_a_tie_that_the_file_knows_half_of_is_refused(tmp_path):
    saved(tmp_path / "a", "tied")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "lm_head" not in k}, path)
    with pytest.raises(rl.RankloomError, match=r"'model.embed_tokens', which is tied to 'lm_head'"):
        rl.load(larger(2, "tied"), tmp_path / "a", full_tensors="take")


def test_beside_modules_that_the_config_saves(tmp_path):
    logits = saved(tmp_path / "a", modules_to_save=["norm"])
    model = larger(2)
    bank = rl.load(model, tmp_path / "a", full_tensors="take")
    assert off(model, "llama", logits) < 1e-5
    assert {"model.norm", "lm_head"} <= set(bank.plans["default"].modules_to_save)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"] == ["norm"]
