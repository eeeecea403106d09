"""A folder from a stranger decides nothing that runs code, reads standard input, or writes elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from rankloom.cli import app

CODE = "trust_remote_code"
EVIL = """\
open({marker!r}, "a").write("x")
from transformers import LlamaConfig, LlamaForCausalLM


class C(LlamaConfig):
    model_type = "evil_x"


class M(LlamaForCausalLM):
    config_class = C
"""


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """The folder of a finished run."""
    root = tmp_path_factory.mktemp("trained")
    rows = [json.dumps({"prompt": f"say {w}", "completion": w}) for w in ("ab", "cd", "ef", "gh", "ij", "kl", "mn")]
    (root / "chats.jsonl").write_text("\n".join(rows))
    settings = ("r=2", "steps=2", "batch_size=2", "eval_answers=1", "answer_tokens=2", "save_every=1")
    words = ("train", f"model={model}", f"data={root / 'chats.jsonl'}", f"out={root / 'run'}", *settings)
    assert CliRunner().invoke(app, words).exit_code == 0
    return root / "run"


@pytest.fixture
def mine(trained, tmp_path):
    """A copy of it, without manifest."""
    copied = shutil.copytree(trained, tmp_path / "mine")
    (copied / "adapter" / "manifest.json").unlink()
    return copied


@pytest.fixture
def marker(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "PWNED"


@pytest.fixture
def evil(model, tmp_path, marker):
    """A model whose classes are Python code beside it, which writes a marker when it is run."""
    base = shutil.copytree(model, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil_x", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(EVIL.format(marker=str(marker)))
    return base


@pytest.fixture
def stranger(evil, mine):
    """A run's folder on that model which asks for the code, with an honest adapter in it."""
    said = "".join(
        line.replace(f"{CODE}: false", f"{CODE}: true")
        if CODE in line
        else f"  path: {evil}\n"
        if "  path:" in line
        else line
        for line in (mine / "config.yaml").read_text().splitlines(keepends=True)
    )
    assert f"{CODE}: true" in said
    (mine / "config.yaml").write_text(said)
    return mine


COMMANDS = [
    ("eval", "{run}"),
    ("eval", "{run}/adapter"),
    ("generate", "{run}", "say ab"),
    ("generate", "{run}/adapter"),
    ("chat", "{run}"),
    ("plan", "{run}"),
    ("merge", "{run}", "{out}"),
    ("export", "{run}", "{out}"),
    ("export", "{run}/adapter", "{out}"),
    ("quantize", "{run}", "{out}", "plan.store=normal_float"),
    ("train", "{run}", "--resume", "auto"),
    ("train", "{run}/config.yaml", "out={out}"),
    ("plan", "{run}", "model={base}"),
]


def filled(command, stranger, evil, tmp_path):
    return [word.format(run=stranger, base=evil, out=tmp_path / "out") for word in command]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_no_file_turns_on_the_code_of_a_model(command, run, stranger, evil, marker, tmp_path):
    found = run(*filled(command, stranger, evil, tmp_path), input="y\ny\ny\n")
    assert found.code == 2
    assert "config.yaml, line" in found.err
    assert f"add {CODE}=true to the command if you trust it" in found.err
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["true", '"yes"', "1", "[1]", "~", "{a: 1}"])
def test_however_it_is_spelled(value, run, evil, marker, tmp_path):
    for text in (
        f"model: {{path: '{evil}', {CODE}: {value}}}",
        f'{{"model": {{"{CODE}": {value}, "path": "{evil}"}}}}',
    ):
        (tmp_path / "r.yaml").write_text(text)
        assert f"add {CODE}=true" in run("plan", tmp_path / "r.yaml").err
        assert run("plan", tmp_path / "r.yaml", f"{CODE}=false").code == 1
    assert not marker.exists()


WORDS = ["eval", "plan", "generate"]


@pytest.mark.parametrize("command", WORDS)
def test_typed_in_the_command_it_is_run(command, run, stranger, marker):
    found = run(command, stranger, f"{CODE}=true", *(["say ab"] if command == "generate" else []))
    assert found.code == 0, found.err
    assert marker.exists()


def test_without_it_no_question_is_put_to_standard_input(run, stranger, evil, chats, marker, tmp_path):
    commands = [
        ("info", evil),
        ("plan", f"model={evil}"),
        ("generate", f"model={evil}"),
        ("eval", f"model={evil}", f"data={chats}"),
        ("eval", stranger, f"{CODE}=false"),
    ]
    for command in commands:
        found = run(*command, input="y\ny\ny\n")
        assert found.code == 1, found.err
        assert f"add {CODE}=true to the command if you trust it" in found.err
        assert "Do you wish to run" not in found.out + found.err
    assert not marker.exists()
    assert run("info", evil, f"{CODE}=true").code == 0
    assert marker.exists()


def test_an_adapter_alone_names_a_base_whose_code_is_not_run(run, stranger, evil, chats, marker, tmp_path):
    alone = shutil.copytree(stranger / "adapter", tmp_path / "alone")
    said = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": str(evil)}))
    asked = ("eval", alone, f"data={chats}")
    assert f"add {CODE}=true to the command" in run(*asked).err
    assert not marker.exists()
    found = run(*asked, f"{CODE}=true")
    assert found.code == 0, found.err


def test_what_an_adapter_says_of_itself_turns_on_nothing(run, mine, evil, chats, marker, tmp_path):
    alone = shutil.copytree(mine / "adapter", tmp_path / "alone")
    said = json.loads((alone / "adapter_config.json").read_text())
    said |= {"base_model_name_or_path": str(evil), CODE: True, "auto_map": {"AutoModel": "evil.M"}}
    (alone / "adapter_config.json").write_text(json.dumps(said))
    for command in (("eval", alone, f"data={chats}"), ("info", alone), ("merge", alone, tmp_path / "out")):
        run(*command)
    assert not marker.exists()


def test_a_model_with_an_adapter_in_its_folder_is_refused(run, model, mine, chats, tmp_path, monkeypatch):
    both = shutil.copytree(model, tmp_path / "both")
    (tmp_path / "planted_core.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((mine / "adapter" / "adapter_config.json").read_text())
    config |= {"megatron_core": "planted_core", "megatron_config": {"a": 1}}
    (both / "adapter_config.json").write_text(json.dumps(config))
    shutil.copy(mine / "adapter" / "adapter_model.safetensors", both)
    found = run("eval", f"model={both}", f"data={chats}")
    assert found.code == 1
    assert "holds a model and an adapter (adapter_config.json)" in found.err
    assert not (tmp_path / "PWNED").exists()


def test_a_runs_folder_is_where_it_is_and_not_where_it_says(run, trained, mine, tmp_path):
    moved = mine.rename(tmp_path / "moved")
    elsewhere = tmp_path / "elsewhere"
    text = (moved / "config.yaml").read_text().replace(f"out: {trained}", f"out: {elsewhere}")
    assert str(elsewhere) in text
    (moved / "config.yaml").write_text(text)
    found = run("train", moved, "--resume", "auto", "--json")
    assert found.code == 0, found.err
    assert found.json["out"] == str(moved)
    assert not elsewhere.exists()


def test_a_runs_folder_names_no_cache_to_write_to(run, mine, tmp_path):
    file, cache = mine / "config.yaml", tmp_path / "cache"
    file.write_text(file.read_text().replace("cache: auto", f"cache: {cache}"))
    refused = run("eval", mine)
    assert refused.code == 2
    assert f"data.cache='{cache}' is a folder to write to" in refused.err
    assert not cache.exists()
    assert run("plan", mine, "cache=auto").code == 0
    assert not cache.exists()
    assert run("plan", mine, f"cache={cache}").code == 0
