"""A tiny causal model and a tiny encoder as plain Hugging Face folders, small data files, and a way to call the command."""

import json
from types import SimpleNamespace

import pytest
import torch
from cli_tiny import byte_tokenizer, llama
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("models") / "tiny", eos_token="<e>", pad_token="<p>")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer(eos_token="<e>", pad_token="<p>").save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path):
    rows = [
        {"prompt": f"say {w}", "completion": w}
        for w in ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx"]
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def run(monkeypatch):
    """`run("plan", "model=…")` → exit code, out, err, and the JSON on standard output if there is any."""
    from rankloom.cli import app

    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments, input=None):
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        try:
            data = json.loads(result.stdout)
        except ValueError:
            data = None
        return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr, json=data)

    return call


@pytest.fixture
def fine_tuned(run, model, chats, tmp_path):
    """A finished run's folder."""
    out = tmp_path / "run"
    found = run("train", f"model={model}", f"data={chats}", f"out={out}", "r=2", "steps=3", "batch_size=4", "--json")
    assert found.code == 0, found.err
    return out
