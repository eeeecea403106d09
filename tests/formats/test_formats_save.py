"""What is written: config fields, compatibility, card, report; and what inspecting and pushing do."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from formats_tiny import X, adapted, config, net, saved, shake
from torch import nn

import rankloom as rl
from rankloom.errors import FileError, RankloomError, SettingsError, StateError
from rankloom.formats import inspect
from rankloom.formats.limits import Limits


def front(folder):
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_defaults_are_left_out_and_sets_are_sorted(tmp_path):
    folder = saved(tmp_path / "a", target_modules=["v", "q"])
    assert config(folder) == {"lora_alpha": 6, "peft_type": "LORA", "r": 4, "target_modules": ["q", "v"]}
    text = (folder / "adapter_config.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"exclude_modules": ["layers.1.q"]}, {"exclude_modules": ["layers.1.q"]}),
        ({"bias": "all"}, {"bias": "all"}),
        ({"rank_pattern": {"v": 2}}, {"rank_pattern": {"v": 2}}),
        ({"alpha_pattern": {"v": 3.0}}, {"alpha_pattern": {"v": 3}}),
        ({"target_modules": "all-linear", "modules_to_save": ["norm"]}, {"modules_to_save": ["norm"]}),
        ({"target_modules": r"layers\.\d\.(q|v)"}, {"target_modules": r"layers\.\d\.(q|v)"}),
    ],
    ids=str,
)
def test_fields_of_the_plan(settings, expected, tmp_path):
    written = config(saved(tmp_path / "a", **settings))
    assert {k: written[k] for k in expected} == expected


def test_a_wording_that_peft_reads_otherwise_is_replaced_by_names(tmp_path):
    written = config(saved(tmp_path / "a", layers_to_transform=[1]))
    assert written["target_modules"] == ["layers.1.q", "layers.1.v"]
    assert "layers_to_transform" not in written


def test_patterns_of_a_start_that_doubles_the_rank(tmp_path):
    model = adapted(rl.LoRA(r=4, lora_alpha=6.0, init_lora_weights="pissa"), rank_pattern={"v": 2})
    rl.save(model, tmp_path / "a")
    written = config(tmp_path / "a")
    assert {written["r"], *written["rank_pattern"].values()} == {4, 8}
    assert written["lora_alpha"] / written["r"] in (6 / 4, 6 / 2)


def test_dropout_beside_target_parameters_is_a_note(tmp_path):
    model = adapted(rl.LoRA(r=2, lora_dropout=0.1), target_parameters=["score.weight"])
    report = rl.save(model, tmp_path / "a")
    assert report.notes == ("lora_dropout is left out of the PEFT config: PEFT refuses it beside target_parameters",)
    assert "lora_dropout" not in config(tmp_path / "a")
    assert rl.load(net(), tmp_path / "a").plans["default"].method.lora_dropout == 0.1


COMPAT = [
    (rl.LoRA(r=4), {}, "PEFT: yes · vLLM: no (it serves no Net with adapters)"),
    (rl.LoRA(r=600), {}, "PEFT: yes · vLLM: no (rank above 512; it serves no Net with adapters)"),
    (rl.DoRA(rl.LoRA(r=4)), {}, "PEFT: yes · vLLM: no (DoRA; it serves no Net with adapters)"),
    (
        rl.LoRA(r=4),
        {"modules_to_save": ["score"]},
        "PEFT: yes · vLLM: no (modules_to_save; it serves no Net with adapters)",
    ),
    (rl.LoRA(r=4), {"bias": "all"}, "PEFT: yes · vLLM: no (trained biases; it serves no Net with adapters)"),
    (
        rl.LoRA(r=4),
        {"rank_pattern": {"q": 2}},
        "PEFT: yes · vLLM: no (rank_pattern or alpha_pattern; it serves no Net with adapters)",
    ),
    (rl.LoRA(r=4, lora_bias=True), {}, "PEFT: yes · vLLM: no (lora_bias; it serves no Net with adapters)"),
    (rl.VeRA(r=4), {}, "PEFT: yes · vLLM: no (it loads LORA only, this is VERA)"),
    (rl.AdaLoRA(), {}, "PEFT: yes · vLLM: no (it loads LORA only, this is ADALORA)"),
    (rl.hydralora(), {}, "PEFT: no (PEFT's LORA has no MixtureAdapter"),
    (
        rl.VeRA(r=4),
        {"trainable_token_indices": {"emb": [1]}},
        "PEFT: no (trainable_token_indices does not go with VERA)",
    ),
    (rl.DoRA(rl.LoRA(r=4, lora_bias=True)), {}, "PEFT: no (PEFT has no lora_bias with DoRA"),
    (rl.DoRA(rl.LoRA(r=4)), {"target_parameters": ["score.weight"]}, "PEFT: no (PEFT's DoRA does not reach bare"),
    (rl.DoRA(rl.VeRA(r=4)), {}, "PEFT: no (PEFT's VERA has no DoRA around it)"),
    (rl.AdaLoRA(), {"target_parameters": ["score.weight"]}, "PEFT: no (ADALORA does not reach parameter sites"),
]


class Worded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 8)
        self.net = net()
        self.score = self.net.score

    def forward(self, x):
        return self.net(self.emb(x))


@pytest.mark.parametrize(("method", "settings", "line"), COMPAT, ids=range(len(COMPAT)))
def test_the_compatibility_line(method, settings, line, tmp_path):
    model = Worded().eval() if "trainable_token_indices" in settings else net()
    bank = rl.attach(model, method, **{"target_modules": ["q", "v"], **settings})
    shake(bank, size=0.01)
    report = rl.save(model, tmp_path / "a")
    assert str(report.compat).startswith(line)
    assert str(report.compat) in (tmp_path / "a" / "README.md").read_text()
    again = Worded().eval() if "trainable_token_indices" in settings else net()
    again.load_state_dict(model.state_dict(), strict=False)
    rl.load(again, tmp_path / "a")
    x = torch.tensor([[0, 1, 2]]) if "trainable_token_indices" in settings else X
    assert torch.equal(again(x), model(x))


def test_the_report(tmp_path):
    report = rl.save(adapted(), tmp_path / "a")
    assert (report.format, report.peft_type, report.tensors, report.parameters) == ("peft", "LORA", 8, 256)
    assert report.bytes == (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert report.folder == tmp_path / "a"
    assert report.pushed is None


def test_the_plain_card(tmp_path):
    data, text = front(saved(tmp_path / "a"))
    assert data == {"library_name": "peft", "license": "unknown", "tags": ["rankloom", "lora", "peft"]}
    assert "PeftModel.from_pretrained" in text
    assert "rankloom 0" in text


def test_a_full_card(tmp_path):
    card = {
        "title": "Mood: v2",
        "description": "Tells moods.",
        "data": ["moods.jsonl, 1,000 rows"],
        "metrics": {"accuracy": {"before": 0.1, "after": 0.95}, "loss": {"after": 0.2}},
        "settings": {"steps": 200, "lr": 1e-3},
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["mood"],
        "intended_use": "Tests.",
    }
    model = adapted(rl.hydralora(r=2))
    model.name_or_path = "some/base: 'x'"
    rl.save(model, tmp_path / "a", card=card)
    data, text = front(tmp_path / "a")
    assert data == {
        "base_model": "some/base: 'x'",
        "library_name": "rankloom",
        "license": "apache-2.0",
        "language": ["en"],
        "tags": ["rankloom", "mixture", "mood"],
    }
    for piece in (
        "# Mood: v2",
        "| accuracy | 0.1 | 0.95 |",
        "| loss |  | 0.2 |",
        "| steps | 200 |",
        "moods.jsonl",
        "Tests.",
    ):
        assert piece in text, piece
    assert "from peft" not in text


def test_an_unknown_card_field_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SettingsError, match="card has no field 'licence'; did you mean 'license'"):
        rl.save(adapted(), tmp_path / "a", card={"licence": "mit"})
    assert not (tmp_path / "a").exists()


def test_inspect_needs_no_model(tmp_path):
    model = adapted()
    model.name_or_path = "some/base"
    rl.save(model, tmp_path / "a")
    info = inspect(tmp_path / "a")
    assert (info.format, info.peft_type, info.base, info.verified) == ("peft", "LORA", "some/base", True)
    assert (info.tensors, info.parameters, info.dtypes) == (8, 256, {"float32": 8})
    assert info.plan["method"] == {"name": "lora", "r": 4, "lora_alpha": 6.0}
    (tmp_path / "a" / "manifest.json").unlink()
    assert inspect(tmp_path / "a").verified is False
    rl.save(adapted(rl.hydralora()), tmp_path / "b")
    assert inspect(tmp_path / "b").format == "rankloom"
    with pytest.raises(RankloomError, match="no such folder"):
        inspect(tmp_path / "c")


def test_push_is_refused_offline_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StateError, match="HF_HUB_OFFLINE is set"):
        rl.save(adapted(), tmp_path / "a", push_to="me/mood")
    with pytest.raises(StateError, match="push_to='a//b'"):
        rl.save(adapted(), tmp_path / "a", push_to="a//b")
    assert not (tmp_path / "a").exists()


def test_push_uploads_the_saved_folder(tmp_path, monkeypatch):
    done = []

    class Api:
        def create_repo(self, repo, private, exist_ok):
            done.append((repo, private, exist_ok))
            return f"https://hub/{repo}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            done.append((repo_id, sorted(p.name for p in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert rl.save(adapted(), tmp_path / "a", push_to="me/mood").pushed == "https://hub/me/mood"
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert done == [("me/mood", True, True), ("me/mood", files)]


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("pickle")

    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, never)
    folder = saved(tmp_path / "a")
    model = net()
    rl.load(model, folder)
    assert torch.equal(model(X), adapted()(X))


def test_unknown_adapters_and_bare_models(tmp_path):
    with pytest.raises(StateError, match="no adapter 'x' in the bank"):
        rl.save(adapted(), tmp_path / "a", name="x")
    with pytest.raises(StateError, match="has no adapters"):
        rl.save(net(), tmp_path / "a")


def test_what_is_too_large_for_load_is_not_written_and_the_remedy_works(tmp_path):
    """Limits are looked at where they are, by save as by load; the message says which to give to both."""
    model = adapted()
    expected = model(X)
    small = {"header": 100, "tensors": 3, "file": 800}
    for name, most in small.items():
        tight = Limits(**{name: most})
        with pytest.raises(
            StateError, match=rf"nothing is written: .*limits=Limits\({name}=\d+\)\).*to load too"
        ) as said:
            rl.save(model, tmp_path / name, limits=tight)
        assert not (tmp_path / name).exists()
        enough = Limits(**{name: int(re.search(rf"{name}=(\d+)", str(said.value))[1])})
        rl.save(model, tmp_path / name, limits=enough)
        with pytest.raises(FileError, match=rf"limits=Limits\({name}=\d+\)"):
            rl.load(net(), tmp_path / name, limits=tight)
        again = rl.load(net(), tmp_path / name, limits=enough).model
        assert torch.equal(again(X), expected)
