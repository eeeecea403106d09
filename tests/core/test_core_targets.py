"""From names to places, compared with PEFT on the same configuration."""

import pytest
import torch
from core_tiny import assert_lives, assert_untouched, llama, nudge, snapshot, tower, words
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError, TargetError


def sites(model, method=None, **plan):
    bank = rl.attach(model, method or rl.LoRA(r=2), **plan)
    return [f.name for f in bank.sites("default")]


def ranks(model, **plan):
    bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=8), **plan)
    return {site: (a.A.shape[-2], round(a.scaling * a.A.shape[-2], 6)) for site, a in bank.adapters()}


def peft_ranks(model, **config):
    from peft.tuners.lora import LoraLayer

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, **config))
    return {
        name.removeprefix("base_model.model."): (
            layer.r["default"],
            round(layer.scaling["default"] * layer.r["default"], 6),
        )
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer)
    }


CONFIGS = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "dotted": {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*layers\.[01]\.(self_attn|mlp)\.(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    "exclude-regex": {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    "layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    "pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "pattern-list": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    "one-layer": {"target_modules": ["q_proj"], "layers_to_transform": 2},
    "rank": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 5}},
    "rank-first-wins": {"target_modules": ["q_proj"], "rank_pattern": {r"layers.0.*q_proj": 3, "q_proj": 5}},
    "rank-whole-name": {
        "target_modules": ["q_proj"],
        "rank_pattern": {r"model.layers.0.self_attn.q_proj": 3, ".*_proj": 7},
    },
    "alpha": {"target_modules": ["q_proj", "o_proj"], "alpha_pattern": {"o_proj": 16}, "rank_pattern": {"o_proj": 4}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_same_sites_ranks_and_scales_as_peft(config):
    found = ranks(llama(depth=3), **config)
    assert found
    assert found == peft_ranks(llama(depth=3), **config)


def test_all_linear_leaves_the_head_and_saved_modules_out():
    found = sites(llama(), target_modules="all-linear", modules_to_save=["down_proj"])
    layers = {name.rsplit(".", 1)[-1] for name in found if not name.endswith(".weight")}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    assert {n for n in found if n.endswith(".weight")} == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


def test_all_linear_is_the_default_and_takes_a_single_layer_as_a_model():
    assert len(sites(llama())) == 14
    layer = nn.Linear(3, 4).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    assert_lives(layer, lambda m: m(x), rl.LoRA(r=2))


def test_lists_tuples_and_sets_are_the_same():
    names = [sites(llama(), target_modules=kind(["v_proj", "q_proj"])) for kind in (list, tuple, set)]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 4


def test_a_suffix_is_a_whole_name_part():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "my_proj": nn.Linear(2, 2)})
    assert sites(model, target_modules=["proj"]) == ["proj"]


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"target_modules": ["q_proj", "v_porj"]}, "target_modules: 'v_porj' matches nothing.*'v_proj'"),
        ({"target_modules": r".*\.qproj"}, r"target_modules: the regular expression '.*qproj' matches no whole name"),
        ({"target_modules": r"q_proj"}, "matches no whole name.*'q_proj'"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["k_porj"]}, "exclude_modules: 'k_porj'.*'k_proj'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "nothing is left"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 7]}, r"no target in block 7.*\[0, 1\]"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"}, "no target in block 0"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 4}}, "rank_pattern: 'k_proj' matches no target"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_porj": 4}}, "alpha_pattern: 'q_porj'.*'q_proj'"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"(": 4}}, "rank_pattern.*not a regular expression"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_heat"]}, "modules_to_save: 'lm_heat'.*'lm_head'"),
        ({"target_modules": ["q_proj"], "target_parameters": ["norm.wait"]}, "target_parameters: 'norm.wait'.*norm.weight"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}}, "trainable_token_indices: 'embed'"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [99]}, r"\[99\] in an embedding of 32 rows"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 1]}, "repeated indices"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"q_proj": [1]}}, "not an embedding"),
        ({"target_modules": ["q_proj"], "bias": "lora"}, "bias='lora': expected one of"),
        ({"target_modules": ["q_proj"], "dtype": "float"}, None),
        ({"target_modules": ["q_proj"], "dtype": "fp32"}, "dtype='fp32' is no floating dtype"),
        ({"target_moduls": ["q_proj"]}, "no setting 'target_moduls'.*'target_modules'"),
        ({"target_modules": ["self_attn"]}, "LlamaAttention.*name its layers instead: k_proj, o_proj, q_proj, v_proj"),
        ({"target_modules": ["q_proj", "mlp"]}, "LlamaMLP.*down_proj, gate_proj, up_proj"),
        ({"target_modules": ["input_layernorm"]}, "LlamaRMSNorm, which cannot be adapted as a layer"),
        ({"target_modules": []}, "adapts nothing"),
        ({"target_modules": [], "target_parameters": ["norm.weight"]}, "not a matrix"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "trainable_token_indices": [1]}, "drop one"),
        ({"layer_replication": [(0, 3)]}, "blocks 0 to 1"),
        ({"layer_replication": [(1, 1)]}, "blocks 0 to 1"),
    ],
)  # fmt: skip
def test_refusals_name_the_thing_and_leave_the_model_alone(plan, says):
    model = llama()
    before = snapshot(model)
    if says is None:
        rl.attach(model, rl.LoRA(r=2), **plan)
        return
    with pytest.raises((TargetError, SettingsError), match=f"(?s){says}"):
        rl.attach(model, rl.LoRA(r=2), **plan)
    assert_untouched(model, before)


def test_a_rank_pattern_reaches_through_combinators_and_refuses_methods_without_a_rank():
    bank = rl.attach(llama(), rl.DoRA(rl.LoRA(r=2)), target_modules=["q_proj"], rank_pattern={"layers.0.*": 5})
    assert [a.inner.A.shape[0] for _, a in bank.adapters()] == [5, 2]
    with pytest.raises(SettingsError, match="no setting 'r'"):
        rl.attach(llama(), rl.AdaLoRA(init_r=3, target_r=2), target_modules=["q_proj"], rank_pattern={"q_proj": 4})


def test_target_parameters_with_blocks_and_patterns():
    found = ranks(
        llama(depth=3), target_modules=[], target_parameters=["q_proj.weight"], layers_to_transform=[1, 2],
        layers_pattern="layers", rank_pattern={r"layers\.2.*": 4},
    )  # fmt: skip
    assert {k: v[0] for k, v in found.items()} == {
        "model.layers.1.self_attn.q_proj.weight": 2,
        "model.layers.2.self_attn.q_proj.weight": 4,
    }


def test_blocks_are_counted_over_layers_and_parameters_together():
    found = sites(
        llama(depth=3), target_modules=["layers.0.self_attn.q_proj"], target_parameters=["layers.2.mlp.up_proj.weight"],
        layers_to_transform=[0, 2],
    )  # fmt: skip
    assert found == ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj.weight"]


def test_target_parameters_as_a_regex():
    found = sites(llama(), target_modules=[], target_parameters=r".*layers\.1.*[qv]_proj\.weight")
    assert found == [f"model.layers.1.self_attn.{n}_proj.weight" for n in "qv"]


def test_a_layer_with_rows_that_rescale_themselves_is_refused():
    with pytest.raises(TargetError, match="max_norm"):
        sites(nn.ModuleDict({"e": nn.Embedding(4, 3, max_norm=1.0)}), target_modules=["e"])


def test_the_same_layer_under_two_names_is_adapted_once():
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert sites(model, target_modules=["a", "b"]) == ["a"]


def test_a_second_adapter_does_not_see_the_first_ones_modules():
    model = llama()
    first = sites(model)
    bank = rl.attach(model, rl.LoRA(r=2), "other")
    assert [f.name for f in bank.sites("other")] == first


def test_the_head_of_an_encoder_decoder_is_found_too():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, tie_word_embeddings=False)
    found = sites(T5ForConditionalGeneration(config), target_modules="all-linear")
    assert "lm_head" not in found
    assert len(found) == 4 + 2 + 8 + 2


def test_site_facts():
    bank = rl.attach(tower(depth=2), rl.LoRA(r=2), target_modules=["q_proj", "v_proj", "head"])
    facts = [(f.name, f.shape, f.index, f.count, f.widest) for f in bank.sites("default")]
    assert [(i, n) for _, _, i, n, _ in facts] == [(i, 5) for i in range(5)]
    assert {w for *_, w in facts} == {(11, 8)}
    nudge(bank)
    assert bank.probe(words()) == ()
