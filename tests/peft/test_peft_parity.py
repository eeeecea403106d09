"""PEFT as the oracle: the same logits both ways, the same keys, and nothing missing or left over."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft_cases as cases
import pytest
import torch
from safetensors.torch import load_file

import rankloom as rl
from rankloom.core.plan import plan_data

TOLERANCE = 1e-5
MOVED = 1e-3
TO = [c for c in cases.CASES if "to" in c.ways]
FROM = [c for c in cases.CASES if "from" in c.ways]
SAME_KEYS = [c for c in TO if "pissa" not in c.id]


def ids(chosen):
    return [c.id for c in chosen]


@pytest.fixture(autouse=True)
def _peft_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def moved(one, logits):
    if one.id == "layer-replication":
        return True
    return float((logits - cases.run(one.model, cases.base(one.model))).abs().max()) > MOVED


@pytest.mark.parametrize("one", TO, ids=ids(TO))
def test_ours_computes_the_same_in_peft(one, tmp_path):
    model = cases.ours_adapted(one)
    expected = cases.run(one.model, model)
    assert moved(one, expected)
    report = rl.save(model, tmp_path / "a")
    assert report.format == "peft"
    assert report.compat.peft.ok
    there, result, said = cases.load_in_peft(one, tmp_path / "a")
    assert result.missing_keys == []
    assert result.unexpected_keys == []
    assert not [w for w in said if "missing" in w or "unexpected" in w.lower()]
    assert float((cases.run(one.model, there) - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("one", SAME_KEYS, ids=ids(SAME_KEYS))
def test_keys_and_shapes_are_those_that_peft_writes(one, tmp_path):
    rl.save(cases.ours_adapted(one), tmp_path / "ours")
    cases.peft_adapted(one).save_pretrained(tmp_path / "peft")
    theirs = cases.keys_of(tmp_path / "peft")
    if one.base_keys:
        theirs = {k: v for k, v in theirs.items() if not k.endswith("embed_tokens.base_layer.weight")}
    assert cases.keys_of(tmp_path / "ours") == theirs


@pytest.mark.parametrize("one", FROM, ids=ids(FROM))
def test_peft_computes_the_same_in_ours(one, tmp_path):
    there = cases.peft_adapted(one)
    expected = cases.run(one.model, there)
    assert moved(one, expected)
    there.save_pretrained(tmp_path / "a")
    model = cases.fresh(one.model)
    rl.load(model, tmp_path / "a")
    assert float((cases.run(one.model, model) - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("one", TO, ids=ids(TO))
def test_save_and_load_are_bitwise_and_keep_the_plan(one, tmp_path):
    model = cases.ours_adapted(one)
    rl.save(model, tmp_path / "a")
    again = cases.fresh(one.model)
    bank = rl.load(again, tmp_path / "a", name="other")
    difference = float((cases.run(one.model, again) - cases.run(one.model, model)).abs().max())
    assert difference <= (1e-6 if one.prune else 0.0)
    assert plan_data(bank.plans["other"]) == plan_data(model.rankloom.plans["default"])
    if not one.prune:
        before = {k: v for k, v, _ in model.rankloom.tensors("default")}
        after = {k: v for k, v, _ in bank.tensors("other")}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("id_", ["lora-grouped-conv", "rslora-grouped-conv"])
def test_grouped_convolution_through_peft_and_back(id_, tmp_path):
    one = next(c for c in cases.CASES if c.id == id_)
    model = cases.ours_adapted(one)
    rl.save(model, tmp_path / "a")
    cases.load_in_peft(one, tmp_path / "a")[0].save_pretrained(tmp_path / "b")
    again = cases.fresh(one.model)
    rl.load(again, tmp_path / "b")
    assert float((cases.run(one.model, again) - cases.run(one.model, model)).abs().max()) < TOLERANCE


def test_a_grouped_convolution_that_mixes_groups_is_refused(tmp_path):
    one = next(c for c in cases.CASES if c.id == "lora-grouped-conv")
    cases.peft_adapted(one).save_pretrained(tmp_path / "a")
    model = cases.fresh(one.model)
    with pytest.raises(rl.RankloomError, match=r"adapter_model\.safetensors: grouped.*mixes its 3 groups"):
        rl.load(model, tmp_path / "a")
    assert not hasattr(model, "rankloom")


def test_pruned_adalora_has_the_kept_triplets_only(tmp_path):
    one = next(c for c in cases.CASES if c.id == "adalora-pruned")
    model = cases.ours_adapted(one)
    rl.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    shapes = cases.keys_of(tmp_path / "a")
    for name, flags in config["rank_pattern"].items():
        assert len(flags) == 4
        assert shapes[f"base_model.model.{name}"] == (sum(flags), 1)
    assert {sum(flags) for flags in config["rank_pattern"].values()} == {2, 3}
    again = cases.fresh(one.model)
    bank = rl.load(again, tmp_path / "a")
    assert {adapter.A.shape[0] for _, adapter in bank.adapters("default")} == {2, 3}
    assert all(p.requires_grad for _, p, _ in bank.tensors("default"))


def test_a_site_without_any_triplet_left_keeps_one(tmp_path):
    one = next(c for c in cases.CASES if c.id == "adalora")
    model = cases.ours_adapted(one)
    next(iter(model.rankloom.adapters("default")))[1].E.data.zero_()
    rl.save(model, tmp_path / "a")
    there = cases.load_in_peft(one, tmp_path / "a")[0]
    expected = cases.run(one.model, model)
    assert float((cases.run(one.model, there) - expected).abs().max()) < TOLERANCE
    again = cases.fresh(one.model)
    rl.load(again, tmp_path / "a")
    assert float((cases.run(one.model, again) - expected).abs().max()) < TOLERANCE


def test_embedding_copy_of_peft_must_equal_the_base(tmp_path):
    one = next(c for c in cases.CASES if c.id == "lora-embedding")
    cases.peft_adapted(one).save_pretrained(tmp_path / "a")
    assert any(k.endswith("embed_tokens.base_layer.weight") for k in cases.keys_of(tmp_path / "a"))
    other = cases.fresh(one.model)
    other.model.embed_tokens.weight.data[4, 2] += 0.5
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(rl.RankloomError, match=r"embed_tokens\.base_layer\.weight.*rows 4 to 4 of 29.*before loading"):
        rl.load(other, tmp_path / "a")
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_modules_to_save_beside_all_biases_in_both_spellings(tmp_path):
    settings = {"target_modules": ["lin"], "modules_to_save": ["norm"], "bias": "all"}
    one = cases.case("x", "attention", cases.ours(), settings, cases.lora("lin", modules_to_save=["norm"], bias="all"))
    there = cases.peft_adapted(one)
    there.save_pretrained(tmp_path / "a")
    assert any("original_module" in key for key in cases.keys_of(tmp_path / "a"))
    model = cases.fresh(one.model)
    rl.load(model, tmp_path / "a")
    assert float((cases.run(one.model, model) - cases.run(one.model, there)).abs().max()) < TOLERANCE
    rl.save(model, tmp_path / "b")
    back, result, _ = cases.load_in_peft(one, tmp_path / "b")
    assert result.missing_keys == result.unexpected_keys == []
    assert float((cases.run(one.model, back) - cases.run(one.model, there)).abs().max()) < TOLERANCE


def test_peft_means_every_name_with_that_ending_by_modules_to_save(tmp_path):
    one = cases.case("x", "llama", cases.ours(), cases.QV, cases.lora("q_proj", "v_proj", modules_to_save=["norm"]))
    there = cases.peft_adapted(one)
    there.save_pretrained(tmp_path / "a")
    model = cases.fresh("llama")
    bank = rl.load(model, tmp_path / "a")
    assert "model.layers.0.input_layernorm" in bank.plans["default"].modules_to_save
    assert float((cases.run("llama", model) - cases.run("llama", there)).abs().max()) < TOLERANCE


def test_ours_means_whole_names_by_modules_to_save(tmp_path):
    model = cases.fresh("llama")
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"], modules_to_save=["norm"])
    cases.shake(p for _, p, _ in bank.tensors("default"))
    rl.save(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["model.norm"]
    assert Path(tmp_path / "a" / "manifest.json").exists()


def test_peft_adds_the_change_of_an_attentions_output_twice_so_half_of_it_is_written(tmp_path):
    one = next(c for c in cases.CASES if c.id == "lora-attention")
    model = cases.ours_adapted(one)
    rl.save(model, tmp_path / "a")
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    (half,) = [v for k, v in written.items() if "out_proj" in k and k.endswith("lora_B.weight")]
    ours = {site.name: site.adapter for site in model.rankloom.sites("default")}
    assert torch.equal(2 * half, ours["attn.out_proj.weight"].B.detach())


@pytest.mark.parametrize(
    "plan",
    [
        {"target_modules": ["attn"], "rank_pattern": {"in_proj_weight": 2}},
        {"target_modules": ["out_proj"]},
        {"target_modules": ["lin"], "target_parameters": ["in_proj_weight"]},
    ],
    ids=str,
)
def test_half_an_attention_is_ours(plan, tmp_path):
    model = cases.fresh("attention")
    rl.attach(model, rl.LoRA(r=4), **plan)
    report = rl.save(model, tmp_path / "a")
    assert report.format == "rankloom"
    assert "with one rank (attn)" in str(report.compat)


def test_patterns_of_attentions_name_the_attention(tmp_path):
    plan = {"target_modules": ["attn", "lin"], "rank_pattern": {"attn.*": 2}, "alpha_pattern": {"attn.*weight": 5}}
    one = cases.case("x", "attention", cases.ours(), plan, cases.lora("attn", "lin"))
    model = cases.ours_adapted(one)
    assert rl.save(model, tmp_path / "a").compat.peft.ok
    there = cases.load_in_peft(one, tmp_path / "a")[0]
    assert float((cases.run("attention", there) - cases.run("attention", model)).abs().max()) < TOLERANCE


def test_two_adapters_of_one_model_are_saved_apart(tmp_path):
    model = cases.fresh("llama")
    for name, targets in (("a", ["q_proj"]), ("b", ["v_proj"])):
        bank = rl.attach(model, rl.LoRA(r=2), name=name, target_modules=targets)
        cases.shake((p for _, p, _ in bank.tensors(name)), seed=len(name) + ord(name))
        rl.save(model, tmp_path / name, name=name)
    assert all("q_proj" in key for key in cases.keys_of(tmp_path / "a"))
    assert all("v_proj" in key for key in cases.keys_of(tmp_path / "b"))
    again = cases.fresh("llama")
    rl.load(again, tmp_path / "a", name="x")
    rl.load(again, tmp_path / "b", name="y")
    for mine, other in (("a", "x"), ("b", "y")):
        with model.rankloom.using(mine), again.rankloom.using(other):
            assert torch.equal(cases.run("llama", model), cases.run("llama", again))
