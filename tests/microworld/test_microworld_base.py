import json
import re

import pytest
import torch
from safetensors.torch import load_file

from rankloom import microworld

transformers = pytest.importorskip("transformers")
BASE = microworld.base_path()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(BASE).eval()


def test_size_and_dtype(model):
    file = BASE / "model.safetensors"
    assert file.stat().st_size <= 10_000_000
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_nothing_else_is_shipped():
    names = {path.name for path in BASE.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_card_lists_the_held_out_tasks():
    text = (BASE / "README.md").read_text()
    section = text.split("## Held out")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, re.M) == list(microworld.held_out())


def test_card_states_the_demo_promise():
    section = (BASE / "README.md").read_text().split("## Held out")[1]
    row = next(line for line in section.splitlines() if line.startswith(f"| `{microworld.DEMO_TASK}`"))
    before, after = (float(cell) for cell in re.findall(r"\d+\.\d(?= %)", row))
    assert before < 10
    assert after > 90


def test_template_and_mask(tokenizer):
    chat = [{"role": "system", "content": "s"}, *microworld.examples("people", "train", 1)[0]["messages"]]
    user, answer = chat[1]["content"], chat[2]["content"]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == f"<|system|> s<|end|><|user|> {user}<|end|><|assistant|> {answer}<|end|>"
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    masked = [i for i, keep in zip(out["input_ids"], out["assistant_masks"]) if keep]
    assert tokenizer.decode(masked) == f" {answer}<|end|>"


def test_unknown_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="unknown role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}], tokenize=False)


def test_every_byte_survives_the_tokenizer(tokenizer):
    text = "Ünïcode\tand 日本\n  two  spaces, 1234!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) == json.loads((BASE / "config.json").read_text())["vocab_size"]


@torch.no_grad()
def exact_match(model, tokenizer, task, n=20):
    rows = [row["messages"] for row in microworld.examples(task, "test", n)]
    prompts = [row[:1] for row in rows]
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**batch, max_new_tokens=24)[:, batch["input_ids"].shape[1] :]
    got = [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    return sum(text == row[1]["content"] for text, row in zip(got, rows)) / n


@pytest.mark.parametrize("task", ["list_reverse", "from_aru", "program_summary"])
def test_base_knows_seen_tasks(model, tokenizer, task):
    assert exact_match(model, tokenizer, task) >= 0.9


@pytest.mark.parametrize("task", microworld.held_out())
def test_base_does_not_know_held_out_tasks(model, tokenizer, task):
    assert exact_match(model, tokenizer, task) <= 0.1
