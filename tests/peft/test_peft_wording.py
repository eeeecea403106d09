"""How other writers word a config: nulls, configs of starts that are over, and starts that rewrite the base."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft_cases as cases
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig

import rankloom as rl
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from rankloom.formats.peft import TRANSLATORS
from rankloom.formats.peft.fields import read_fields

TOLERANCE = 1e-5
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "vera": VeraConfig(r=256, target_modules=["q_proj", "v_proj"]),
    "adalora": AdaLoraConfig(init_r=12, target_r=8, target_modules=["q_proj", "v_proj"], total_step=900),
}
NEEDED = {"peft_type", "r", "init_r", "total_step"}


@pytest.fixture(autouse=True)
def _peft_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(folder, config, model="llama", **saving):
    """PEFT's logits with random tensors, after it has written its folder."""
    there = get_peft_model(cases.fresh(model), config).eval()
    cases.shake(p for p in there.parameters() if p.requires_grad)
    logits = cases.run(model, there)
    there.save_pretrained(folder, **saving)
    return logits


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def loaded(folder, model="llama"):
    ours = cases.fresh(model)
    rl.load(ours, folder)
    return cases.run(model, ours)


def same(folder, logits, model="llama", tolerance=TOLERANCE):
    assert float((loaded(folder, model) - logits).abs().max()) < tolerance


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("wording")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: (root / name, made(root / name, config)) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("method", CONFIGS)
def test_null_is_the_default(method, folders):
    folder, logits = folders[method]
    path = folder / "adapter_config.json"
    said = json.loads(path.read_text())
    fields = TRANSLATORS[said["peft_type"]].fields
    nulls = [field.name for field in dataclasses.fields(CONFIGS[method]) if field.name not in NEEDED]
    for name in nulls:
        left_out = {k: v for k, v in said.items() if k != name}
        assert read_fields({**said, name: None}, fields, "x") == read_fields(left_out, fields, "x")
    path.write_text(json.dumps({**said, **dict.fromkeys(nulls)}))
    try:
        same(folder, logits)
    finally:
        path.write_text(json.dumps(said))


def test_settings_that_were_not_given(tmp_path):
    """Axolotl, and whoever else hands PEFT the None of a setting that was not given."""
    unset = dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "init_lora_weights"))
    logits = made(tmp_path / "a", LoraConfig(r=4, target_modules=["q_proj"], **unset))
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert all(said[field] is None for field in unset)
    same(tmp_path / "a", logits)


OVER = {
    "corda": {"corda_config": dataclasses.asdict(CordaConfig())},
    "lora_ga": {"lora_ga_config": dataclasses.asdict(LoraGAConfig())},
    "loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "eva": {"eva_config": {"rho": 2.0}},
    "empty": {"corda_config": {}, "lora_ga_config": {}, "loftq_config": {}, "eva_config": {}},
    "off": {"megatron_config": {}, "alora_invocation_tokens": [], "use_bdlora": False, "layers_to_transform": []},
}


@pytest.mark.parametrize("name", OVER)
def test_what_acted_at_the_start_only_says_nothing_of_the_function(name, folders, tmp_path):
    logits = made(tmp_path / "a", CONFIGS["lora"])
    edit(tmp_path / "a", **OVER[name])
    if name != "off":
        there = PeftModel.from_pretrained(cases.fresh("llama"), tmp_path / "a").eval()
        assert float((cases.run("llama", there) - logits).abs().max()) < TOLERANCE
    same(tmp_path / "a", logits)


@pytest.mark.parametrize("field", ["kasa_config", "arrow_config", "velora_config", "monteclora_config"])
def test_an_empty_config_of_a_variant_is_no_null(field, folders, tmp_path):
    """PEFT fills it with defaults, which act."""
    made(tmp_path / "a", CONFIGS["lora"])
    edit(tmp_path / "a", **{field: {}})
    with pytest.raises(rl.RankloomError, match=rf"{field}={{}} changes what the adapter computes"):
        loaded(tmp_path / "a")


@pytest.mark.parametrize("start", ["olora", "pissa"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_alpha": 3}], ids=str)
def test_a_start_that_rewrites_the_base_is_made_again(start, settings, tmp_path):
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **settings})
    config.init_lora_weights = start
    same(tmp_path / "a", made(tmp_path / "a", config))
    again = cases.fresh("llama")
    rl.load(again, tmp_path / "a")
    rl.save(again, tmp_path / "b")
    there = PeftModel.from_pretrained(cases.fresh("llama"), tmp_path / "b").eval()
    assert float((cases.run("llama", there) - cases.run("llama", again)).abs().max()) < TOLERANCE


def test_a_converted_start_is_a_plain_lora(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora")
    there = get_peft_model(cases.fresh("llama"), config).eval()
    there.peft_config["default"].init_lora_weights = True
    there.save_pretrained(tmp_path / "start")
    there.peft_config["default"].init_lora_weights = "olora"
    cases.shake(p for p in there.parameters() if p.requires_grad)
    there.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 8
    same(tmp_path / "a", cases.run("llama", there))


@pytest.mark.parametrize("rounds", [0, 16])
def test_a_sketched_start_is_read_as_the_exact_one_and_says_so(rounds, tmp_path):
    start = f"pissa_niter_{rounds}"
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=start)
    logits = made(tmp_path / "a", config)
    with pytest.warns(UserWarning, match=rf"init_lora_weights='{start}': PEFT drew a random sketch"):
        ours = loaded(tmp_path / "a")
    there = PeftModel.from_pretrained(cases.fresh("llama"), tmp_path / "a").eval()
    moved = float((logits - cases.run("llama", cases.fresh("llama"))).abs().max())
    off = float((ours - logits).abs().max())
    assert off < 0.1 * moved
    assert off < 3 * float((cases.run("llama", there) - logits).abs().max())


def test_embeddings_start_plainly_whatever_the_start(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights="pissa")
    same(tmp_path / "a", made(tmp_path / "a", config, save_embedding_layers=False))


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("corda", "path_initial_model_for_weight_conversion"),
        ("lora_ga", "path_initial_model_for_weight_conversion"),
        ("loftq", "quantises the base anew"),
        ("pisa", "did you mean 'pissa'"),
        ("pissa_niter_", "no start of a LORA"),
    ],
)
def test_other_starts_are_refused_with_what_to_do(start, says, folders, tmp_path):
    made(tmp_path / "a", CONFIGS["lora"])
    edit(tmp_path / "a", init_lora_weights=start)
    with pytest.raises(rl.RankloomError, match=rf"init_lora_weights='{start}' .*{says}"):
        loaded(tmp_path / "a")


def test_olora_starts_at_zero_and_trains():
    model = cases.fresh("llama")
    before = cases.run("llama", model)
    bank = rl.attach(model, rl.LoRA(r=4, init_lora_weights="olora"), target_modules=["q_proj"])
    assert torch.equal(cases.run("llama", model), before)
    adapter = bank.sites("default")[0].adapter.inner
    rows = torch.linalg.qr(bank.sites("default")[0].base.matrix())
    assert torch.allclose(adapter.B @ adapter.A, rows.Q[:, :4] @ rows.R[:4], atol=1e-6)


@pytest.mark.parametrize("model", ["tied", "llama"])
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": r".*(q_proj|embed_tokens)"},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    ],
    ids=str,
)
def test_tied_weights_stay_tied_as_the_config_says(model, settings, tmp_path):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "ensure_weight_tying": True, **settings})
    logits = made(tmp_path / "a", config, model, save_embedding_layers=False)
    again = cases.fresh(model)
    rl.load(again, tmp_path / "a")
    assert float((cases.run(model, again) - logits).abs().max()) < TOLERANCE
    rl.save(again, tmp_path / "b")
    there = PeftModel.from_pretrained(cases.fresh(model), tmp_path / "b").eval()
    assert float((cases.run(model, there) - logits).abs().max()) < TOLERANCE


@pytest.mark.parametrize("words", [["mlp"], r".*\.mlp", ["mlp", "q_proj"], r".*(mlp|q_proj)"])
def test_peft_excludes_nothing_of_a_container(words, tmp_path):
    """Ours does (`Plan`): the folder is read with PEFT's meaning, and stays what it is when it is saved again."""
    logits = made(
        tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj", "up_proj", "down_proj"], exclude_modules=words)
    )
    ours = cases.fresh("llama")
    rl.load(ours, tmp_path / "a")
    assert float((cases.run("llama", ours) - logits).abs().max()) < TOLERANCE
    rl.save(ours, tmp_path / "b")
    same(tmp_path / "b", logits)
