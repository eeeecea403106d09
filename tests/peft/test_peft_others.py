"""What LOHA, LOKR, HIRA and IA3 files say beside their tensors, and where PEFT computes something else than it means."""

from __future__ import annotations

import json
import warnings

import peft_cases as cases
import pytest

import rankloom as rl
from peft import HiraConfig, IA3Config, LoKrConfig, PeftModel, get_peft_model
from rankloom.formats.peft import OTHERS, PROMPTS, TRANSLATORS


@pytest.fixture(autouse=True)
def _peft_may_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(folder, config, model="llama"):
    there = get_peft_model(cases.fresh(model), config).eval()
    cases.shake(p for p in there.parameters() if p.requires_grad)
    there.save_pretrained(folder)
    return cases.run(model, there)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("targets", "forward"),
    [
        (["q_proj", "down_proj", "up_proj"], ["down_proj", "up_proj"]),
        (["q_proj", "down_proj"], r".*down_proj"),
        (r".*\.(q_proj|down_proj|up_proj)", ["own_proj"]),
        (["q_proj", "up_proj"], []),
    ],
    ids=str,
)
def test_the_words_for_feed_forward_layers_go_both_ways(targets, forward, tmp_path):
    logits = made(tmp_path / "a", IA3Config(target_modules=targets, feedforward_modules=forward))
    model = cases.fresh("llama")
    rl.load(model, tmp_path / "a")
    assert float((cases.run("llama", model) - logits).abs().max()) < 1e-5
    rl.save(model, tmp_path / "b")
    there = PeftModel.from_pretrained(cases.fresh("llama"), tmp_path / "b").eval()
    assert float((cases.run("llama", there) - logits).abs().max()) < 1e-5


def test_feed_forward_layers_that_are_no_list_of_targets_become_one_expression(tmp_path):
    model = cases.fresh("llama")
    bank = rl.attach(model, rl.IA3(("layers.0.mlp.up_proj",)), target_modules=["q_proj", "up_proj"])
    cases.shake(p for _, p, _ in bank.tensors("default"))
    assert rl.save(model, tmp_path / "a").compat.peft.ok
    assert config_of(tmp_path / "a")["feedforward_modules"] == r"model\.layers\.0\.mlp\.up_proj"
    there = PeftModel.from_pretrained(cases.fresh("llama"), tmp_path / "a").eval()
    assert float((cases.run("llama", there) - cases.run("llama", model)).abs().max()) < 1e-5


def test_a_conv1d_whose_axes_peft_mixes_is_ours(tmp_path):
    model = cases.fresh("conv")
    bank = rl.attach(model, rl.LoKr(r=8), target_modules=["one"])
    cases.shake(p for _, p, _ in bank.tensors("default"))
    report = rl.save(model, tmp_path / "a")
    assert report.format == "rankloom"
    assert "mixes the axes of a Conv1d" in str(report.compat)
    made(tmp_path / "b", LoKrConfig(r=8, target_modules=["one"]), "conv")
    with pytest.raises(rl.RankloomError, match="mixes the axes of a Conv1d"):
        rl.load(cases.fresh("conv"), tmp_path / "b")


def test_hira_has_one_rank_in_peft(tmp_path):
    logits = made(tmp_path / "a", HiraConfig(r=3, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2}))
    model = cases.fresh("llama")
    with pytest.warns(UserWarning, match="does not follow rank_pattern"):
        rl.load(model, tmp_path / "a")
    assert float((cases.run("llama", model) - logits).abs().max()) < 1e-5
    rl.attach(model, rl.HiRA(r=3), "two", target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    assert "does not follow rank_pattern" in str(rl.save(model, tmp_path / "b", "two").compat)


@pytest.mark.parametrize("method", [rl.LoHa(r=2), rl.HiRA(r=2), rl.IA3()], ids=lambda m: type(m).__name__)
def test_biases_that_peft_has_no_word_for_keep_the_adapter_ours(method, tmp_path):
    model = cases.fresh("llama")
    rl.attach(model, method, target_modules=["q_proj"], bias="lora_only")
    report = rl.save(model, tmp_path / "a")
    assert report.format == "rankloom"
    assert "bias='lora_only' does not go with" in str(report.compat)


def test_vera_has_no_word_for_excluded_modules(tmp_path):
    model = cases.fresh("llama")
    excluded = ["layers.0.self_attn.q_proj"]
    rl.attach(model, rl.VeRA(r=4), target_modules=["q_proj", "v_proj"], exclude_modules=excluded)
    cases.shake(p for _, p, role in model.rankloom.tensors("default") if role != "basis")
    rl.save(model, tmp_path / "a")
    there = PeftModel.from_pretrained(cases.fresh("llama"), tmp_path / "a").eval()
    assert float((cases.run("llama", there) - cases.run("llama", model)).abs().max()) < 1e-5


def test_every_type_of_peft_is_read_or_known_by_name(tmp_path):
    from peft import PeftType

    assert {t.value for t in PeftType} <= {*TRANSLATORS, *OTHERS, *PROMPTS}
    made(tmp_path / "a", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    path = tmp_path / "a" / "adapter_config.json"
    for said, says in (("OFT", "does not read; merge it"), ("P_TUNING", "changes no weight"), ("LOAR", "did you mean")):
        path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": said}))
        with pytest.raises(rl.RankloomError, match=says) as error:
            rl.load(cases.fresh("llama"), tmp_path / "a")
        assert ("did you mean" in str(error.value)) == (said == "LOAR")
