"""A broken model's folder, a full disk, a missing tokenizer: one line that names the file and the next step."""

from __future__ import annotations

import json
import random
import shutil
import time

import pytest
import torch
from cli_tiny import llama
from safetensors import SafetensorError
from typer.testing import CliRunner

from rankloom.cli import app
from rankloom.hf import shards
from rankloom.hf.models import load_model
from rankloom.train.config import ModelSettings

VALUES = [
    None, True, False, 0, -1, 1, 3, 7, 10**6, 10**18, 2.5, 1e308, "", "x", "gpt2", "bert", "LlamaForCausalLM", "float16",
    [], [1], ["X"], {}, {"a": 1},
]  # fmt: skip
SECONDS = 20
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with an honest model m, data c.jsonl and a run of two steps."""
    root = tmp_path_factory.mktemp("world")
    llama(root / "m", eos_token="<e>", pad_token="<p>")
    rows = [json.dumps({"prompt": f"say {w}", "completion": w}) for w in ("ab", "cd", "ef", "gh", "ij", "kl", "mn")]
    (root / "c.jsonl").write_text("\n".join(rows))
    done = call("train", f"model={root / 'm'}", f"data={root / 'c.jsonl'}", f"out={root / 'run'}", *SHORT)
    assert done.exit_code == 0, done.stderr
    (root / "run" / "adapter" / "manifest.json").unlink()
    return root


SHORT = ("r=2", "steps=1", "batch_size=2", "eval_answers=1", "answer_tokens=2")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def copied(world, tmp_path):
    return shutil.copytree(world / "m", tmp_path / "b")


def commands(world, model, out):
    data = f"data={world / 'c.jsonl'}"
    return {
        "info": ("info", model),
        "plan": ("plan", f"model={model}", data),
        "merge": ("merge", world / "run", f"model={model}", out / "merged", "--no-verify"),
        "export": ("export", world / "run", f"model={model}", out / "exported"),
        "eval": ("eval", f"model={model}", data, "eval_answers=1", "answer_tokens=2"),
        "train": ("train", f"model={model}", data, f"out={out / 'trained'}", *SHORT),
    }


def refused(done):
    """The one line that an error is."""
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code in (1, 2), done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith(lines[0])
    return lines[0]


def damaged(draw, model):
    """What was done to one of its files."""
    act = draw.choice(
        ["truncate", "flip", "missing", "empty", "text", "field", "field", "field", "field", "drop", "more"]
    )
    path = draw.choice(sorted(model.iterdir()))
    raw = path.read_bytes()
    if act == "truncate":
        path.write_bytes(raw[: draw.randrange(len(raw))])
    elif act == "flip":
        flipped = bytearray(raw)
        for _ in range(draw.randint(1, 4)):
            flipped[draw.randrange(min(len(raw), 3000))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
    elif act == "missing":
        path.unlink()
    elif act == "empty":
        path.write_bytes(b"")
    elif act == "text":
        path.write_text(draw.choice(["[]", "{", "null", "{}", "\0" * 50, '{"a": NaN}', "[" * 100_000]))
    else:
        path = model / (draw.choice(TOKENIZER) if act == "more" else "config.json")
        said = json.loads(path.read_text())
        key = draw.choice(sorted(said))
        said[key] = draw.choice(VALUES)
        path.write_text(json.dumps({k: v for k, v in said.items() if act != "drop" or k != key}))
        return f"{act} {path.name} {key}={said[key]!r}"
    return f"{act} {path.name}"


@pytest.mark.parametrize("seed", range(16))
def test_a_damaged_model_is_refused_in_one_line_or_works(seed, world, copied, tmp_path):
    draw = random.Random(seed)
    what = damaged(draw, copied)
    name, words = draw.choice(sorted(commands(world, copied, tmp_path).items()))
    start = time.monotonic()
    done = call(*words)
    assert time.monotonic() - start < SECONDS, (what, name)
    if done.exit_code:
        assert refused(done), (what, name)


@pytest.mark.parametrize("name", ["plan", "eval", "train", "merge", "export"])
@pytest.mark.parametrize("cut", [3, 800, -1])
def test_a_truncated_download_is_named(name, cut, world, copied, tmp_path):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    if name == "plan":
        assert call(*commands(world, copied, tmp_path)[name]).exit_code == 0  # it reads no weights
        return
    said = refused(call(*commands(world, copied, tmp_path)[name]))
    assert f"{path}: " in said
    assert "download it again" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"]


@pytest.mark.parametrize("change", [{"intermediate_size": 40}, {"vocab_size": 300}, {"num_key_value_heads": 2}])
def test_a_configuration_that_does_not_fit_the_weights(change, world, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **change}))
    for name in ("eval", "train", "export"):
        said = refused(call(*commands(world, copied, tmp_path)[name]))
        assert "its weights do not fit its config.json: 'model." in said
        assert "has shape (" in said
        assert "the configuration makes it (" in said


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**6}, {"text_config": {"num_experts": 10**7}}])
def test_a_configuration_of_a_million_layers(change, world, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, **change}))
    for words in commands(world, copied, tmp_path).values():
        assert "; at most 4096 are made" in refused(call(*words))


ARCHITECTURES = [
    "bert",
    "bloom",
    "cohere",
    "deepseek_v3",
    "falcon",
    "gemma",
    "glm",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "jamba",
    "mamba",
    "mixtral",
    "mpt",
    "olmoe",
    "opt",
    "phi3",
    "qwen2",
    "qwen3_moe",
    "rwkv",
    "t5",
    "vit",
    "whisper",
]
SMALL = {
    "num_hidden_layers": 1,
    "n_layer": 1,
    "num_layers": 1,
    "hidden_size": 16,
    "n_embd": 16,
    "d_model": 16,
    "vocab_size": 64,
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_configuration_of_any_architecture_is_described_or_refused_in_one_line(kind, tmp_path):
    from transformers import CONFIG_MAPPING

    draw = random.Random(kind)
    said = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    said |= {key: value for key, value in SMALL.items() if key in said}
    said[draw.choice(sorted(said))] = draw.choice(VALUES)
    (tmp_path / "config.json").write_text(json.dumps(said))
    start = time.monotonic()
    done = call("info", tmp_path)
    assert time.monotonic() - start < SECONDS
    if done.exit_code:
        refused(done)


@pytest.fixture
def mute(copied):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copied / name).unlink()
    return copied


@pytest.mark.parametrize("name", ["plan", "eval", "train"])
def test_a_model_without_a_tokenizer_is_told_as_such(name, world, mute, tmp_path):
    assert f"{mute}: no tokenizer in this folder" in refused(call(*commands(world, mute, tmp_path)[name]))
    tokenizer = load_model(ModelSettings(str(world / "m"))).tokenizer
    tokenizer.save_pretrained(mute)
    assert call(*commands(world, mute, tmp_path)[name]).exit_code == 0


def test_merge_and_export_need_no_tokenizer(world, mute, tmp_path):
    words = commands(world, mute, tmp_path)
    for name, out in (("merge", "merged"), ("export", "exported")):
        done = call(*(word for word in words[name] if word != "--no-verify"))
        assert done.exit_code == 0, done.stderr
        assert (tmp_path / out).is_dir()
    plain = call("merge", world / "run", tmp_path / "plain")
    assert plain.exit_code == 0, plain.stderr
    ours, theirs = (shards.Shards(tmp_path / name) for name in ("merged", "plain"))
    assert all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in theirs.names)


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("merge", "{world}/run", "{out}"), SafetensorError(FULL)),
        (("merge", "{world}/run", "{out}"), OSError(28, "No space left on device")),
        (("quantize", "model={world}/m", "plan.store=normal_float", "-o", "{out}"), SafetensorError(FULL)),
        (
            ("quantize", "model={world}/m", "method=loftq", "r=2", "-o", "{out}"),
            Exception("File too large (os error 27)"),
        ),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(words, error, world, tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    said = refused(call(*(word.format(world=world, out=tmp_path / "out") for word in words)))
    assert "cannot be written: " in said
    assert "free space, or give another out=" in said
    assert list(tmp_path.iterdir()) == []


ROWS = [
    ({"prompt": "a", "completion": None}, "completion", "null|None|None"),
    ({"prompt": "a \ud800 b", "completion": "x"}, "prompt", "surrogate|ud800"),
    ({"prompt": "a", "completion": "x\udfff"}, "completion", "surrogate|udfff"),
    ({"messages": [{"role": "user", "content": "\udc00"}, {"role": "assistant", "content": "b"}]}, "content", "udc00"),
]


@pytest.mark.parametrize(("row", "field", "why"), ROWS, ids=range(len(ROWS)))
def test_a_text_that_is_none_is_named_by_line_and_field(row, field, why, world, tmp_path):
    good = (
        {"prompt": "a", "completion": "b"}
        if "prompt" in row
        else {"messages": [dict(m, content="a") for m in row["messages"]]}
    )
    rows = [json.dumps(good)] * 3 + [json.dumps(row)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    said = refused(call("plan", f"model={world / 'm'}", f"data={tmp_path / 'x.jsonl'}"))
    assert "x.jsonl, line 4" in said
    assert field in said


def test_labels_that_are_numbers_with_a_point(world, tmp_path):
    rows = [json.dumps({"text": f"t{i}", "label": i + 0.5}) for i in range(9)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    said = refused(call("plan", f"model={world / 'm'}", f"data={tmp_path / 'x.jsonl'}"))
    assert "x.jsonl, line 1: field 'label' must be a string or a whole number" in said
