"""A tiny causal model and a tiny encoder as plain Hugging Face folders, small data files, and a way to call the command."""

import json
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

CHAT = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{%- generation -%}{{- m['content'] + '<e>' -}}"
    "{%- endgeneration -%}{%- else -%}{{- '<u>' + m['content'] + '<a>' -}}{%- endif -%}{%- endfor -%}"
)
SPECIAL = ["<p>", "<e>", "<u>", "<a>"]


def byte_tokenizer(**special):
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=64, **special)
    made.add_special_tokens({"additional_special_tokens": ["<u>", "<a>"]})
    return made


def llama(folder, **special):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer(**special)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


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
    rows = [{"prompt": f"say {w}", "completion": w} for w in "ab cd ef gh ij kl mn op qr st uv wx".split()]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def run(monkeypatch):
    """`run("plan", "model=…")` → exit code, out, err, and the JSON on standard output if there is any."""
    from rankloom.cli.app import app

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
