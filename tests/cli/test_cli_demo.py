"""The demonstration on few steps, and the word-order task: its data, its probe, its encoder's digest."""

import json

import pytest
import torch

from rankloom.cli.screen import Screen
from rankloom.errors import FileError
from rankloom.recipes import demo, wordorder
from rankloom.recipes.docstrings import labelled


def test_demo_runs_every_arrow(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "DEMO", {"steps": 4, "lr": 3e-3, "batch_size": 4})
    monkeypatch.setattr(demo, "JUDGED", 4)
    monkeypatch.setattr(demo, "RECORDS", 40)
    monkeypatch.setattr(wordorder, "installed", lambda: False)
    told = []
    monkeypatch.setattr(Screen, "stage", lambda self, what, text: told.append(f"{what}: {text}"))
    found = run("demo", "--out", tmp_path / "d", "--json")
    assert found.code == 0, found.err
    data = found.json
    assert data["reloaded"]["largest"] == 0.0
    assert data["merged"]["relative"] < 1e-3  # the base lies in float16 files, and so does what is merged
    assert data["steps"] == 4
    assert data["after"]["loss"] != data["before"]["loss"]
    assert len(data["answers"]) == 3
    assert data["word_order"] is None
    assert json.loads((tmp_path / "d" / "run" / "run.json").read_text())["steps"] == 4
    assert (tmp_path / "d" / "run" / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "d" / "merged" / "model.safetensors").is_file()
    assert run("demo", "--out", tmp_path / "d" / "run").code == 1
    assert "step 4/4" in found.err
    for word in ("model: the embedded base", "list_rotate", "preview", "loss: ", "•", "word order: skipped"):
        assert word in "\n".join(told), word
    assert [command.split()[1] for command in data["next_commands"]] == ["eval", "generate", "chat", "merge", "train"]


def test_sentences_are_disjoint_balanced_and_short():
    rows = labelled()
    train, test = rows["train"], rows["test"]
    assert (len(train), len(test)) == (2000, 784)
    key = [{tuple(sorted(text.lower().split())) for text, _ in part} for part in (train, test)]
    assert not key[0] & key[1]
    for part in (train, test):
        assert sum(label for _, label in part) == len(part) // 2
        assert all(7 <= len(text.split()) <= 18 for text, _ in part)


def test_probe_finds_a_linear_rule_and_no_other():
    torch.manual_seed(0)
    x = torch.randn(1200, 6)
    linear, parity = (x[:, 0] + x[:, 1] > 0).long(), ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    assert wordorder.probe_accuracy(x[:800], linear[:800], x[800:], linear[800:]) > 0.97
    assert wordorder.probe_accuracy(x[:800], parity[:800], x[800:], parity[800:]) < 0.6


def test_other_weights_are_refused(monkeypatch):
    pytest.importorskip(wordorder.PACKAGE)
    monkeypatch.setattr(wordorder, "SHA256", "0" * 64)
    with pytest.raises(FileError, match="SHA-256"):
        wordorder.encoder_path()


@pytest.mark.slow
def test_lora_learns_word_order_where_a_probe_does_not():
    pytest.importorskip(wordorder.PACKAGE)
    found = wordorder.run_word_order()
    assert found.probe < 0.6
    assert found.lora >= 0.72
    assert found.lora >= found.probe + 0.12
