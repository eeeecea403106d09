"""What is noted of a run: once, in one line, and only where it helps; and what a refused run leaves behind: nothing."""

import json
import os
import re
import warnings

import pytest
from cli_tiny import llama
from torch import nn

import rankloom as rl
from rankloom.cli.command import for_people
from rankloom.core.plan import as_plan, default_plan
from rankloom.jobs.notes import plan_notes
from rankloom.store.base import Packed
from rankloom.train.data import load, prepare


@pytest.mark.parametrize(
    ("method", "note"),
    [
        (rl.LoRA(), None),
        (rl.LoRA(r=4), None),
        (rl.LoRA(r=64), "r=64 with lora_alpha=8 scales the change by 0.125: lora_alpha=64"),
        (rl.LoRA(r=16), "lora_alpha=16"),
        (rl.LoRA(r=64, lora_alpha=64), None),
        (rl.LoRA(r=64, lora_alpha=16), None),
        (rl.LoRA(r=256, lora_alpha=16), "lora_alpha=256"),
        (rl.LoRA(r=64, scaling="rslora"), None),
        (rl.DoRA(rl.LoRA(r=64)), "lora_alpha=64"),
        (rl.Mixture(rl.LoRA(r=64), 2), "lora_alpha=64"),
    ],
)
def test_a_scale_that_fell_with_the_rank_is_noted_once(method, note):
    found = plan_notes(as_plan(method), nn.Linear(2, 2))
    assert len(found) == (note is not None)
    assert note is None or note in found[0]


@pytest.mark.parametrize("name", ["lora", "qlora", "loftq", "lq_lora", "lqer", "dylora", "hydralora", "vera", "dora"])
def test_nothing_is_noted_of_defaults(name):
    assert plan_notes(default_plan(name), nn.Linear(2, 2)) == ()


def test_qa_lora_on_a_dense_base_says_so():
    plan = default_plan("qa_lora")
    [note] = [n for n in plan_notes(plan, nn.Linear(2, 2)) if "dense" in n]
    assert "store=uniform start=gptq" in note
    packed = nn.Linear(32, 32)
    packed.weight = nn.Parameter(rl.Uniform().pack(packed.weight), requires_grad=False)
    assert isinstance(packed.weight, Packed)
    assert not [n for n in plan_notes(plan, packed) if "dense" in n]
    assert not [n for n in plan_notes(as_plan(plan, {"store": rl.Uniform()}), nn.Linear(2, 2)) if "dense" in n]


ROWS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": "say <e> now", "completion": "b"},
    {"prompt": "a", "completion": "  "},
    {"prompt": "<u>", "completion": ""},
]


def test_empty_answers_and_control_tokens_in_texts_are_counted(model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    silent = "2 of 4 conversations have an empty answer"
    control = "2 of 4 conversations hold special tokens"
    for _ in range(2):  # tokenised, then found in the cache
        notes = " ".join(prepare(load(ROWS), tokenizer, cache=tmp_path).notes)
        assert silent in notes
        assert control in notes
    assert "conversations" not in " ".join(prepare(load(ROWS[:1] * 3), tokenizer).notes)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    talk = [{"messages": [{"role": "user", "content": "q"}, call, {"role": "assistant", "content": "x"}]}]
    assert not [note for note in prepare(load(talk), tokenizer).notes if "empty" in note]


def test_plan_and_train_tell_of_them(run, model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3))
    given = [f"model={model}", f"data={data}", "r=64", "answer_tokens=4", "steps=1"]
    assert re.search(r"[56] of 11 conversations have an empty answer", run("plan", *given).out)
    found = run("train", *given, f"out={tmp_path / 'o'}")
    shown = found.out + found.err
    assert shown.count("empty answer") == 1
    assert shown.count("lora_alpha=64 keeps") == 1


def test_a_tokenizers_note_comes_once(run, chats, tmp_path, tmp_path_factory):
    model = llama(tmp_path_factory.mktemp("nopad") / "m", eos_token="<e>")
    found = run("train", f"model={model}", f"data={chats}", f"out={tmp_path / 'r'}", "steps=1", "answer_tokens=4")
    assert found.code == 0, found.err
    assert (found.out + found.err).count("no pad token") == 1


def test_warnings_are_lines_without_a_place_in_the_source():
    before = warnings.formatwarning
    with for_people():
        made = warnings.formatwarning
        assert made("tell the user\x1b[2J", UserWarning, "file.py", 3) == "warning: tell the user\\x1b[2J\n"
        assert made("tell the user\x1b[2J", UserWarning, "other.py", 4) == ""
        assert made("will be removed", FutureWarning, "file.py", 3) == ""
    assert warnings.formatwarning is before


@pytest.mark.parametrize("how", ["a setting", "the first step"])
def test_a_run_refused_early_leaves_nothing_in_the_way(run, model, chats, tmp_path, how, monkeypatch):
    out = tmp_path / "o"
    given = ["train", f"model={model}", f"data={chats}", f"out={out}", "steps=1", "r=2", "eval_answers=0"]
    with monkeypatch.context() as patch:
        if how == "the first step":
            patch.setattr("rankloom.train.loop.guard.Reached.look", fails)
        refused = run(*given, *(["patience=2"] if how == "a setting" else []))
    assert refused.code != 0
    assert [name for name in os.listdir(out) if not name.startswith(".")] == []
    again = run(*given)
    assert again.code == 0, again.err


def fails(*args, **named):
    raise rl.errors.UnreachedError("no gradient")


def test_a_run_that_broke_off_later_keeps_what_it_has(run, model, chats, tmp_path, monkeypatch):
    out = tmp_path / "o"
    given = [
        "train",
        f"model={model}",
        f"data={chats}",
        f"out={out}",
        "steps=2",
        "r=2",
        "eval_answers=0",
        "log_every=1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr("rankloom.jobs.runs._result", fails)
        assert run(*given).code == 1
    assert (out / "metrics.jsonl").is_file()
    refused = run(*given)
    assert "--resume auto goes on with it" in refused.err
    assert run(*given, "--resume", "auto").code == 0
