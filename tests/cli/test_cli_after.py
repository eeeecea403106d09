"""What comes after a training: folders that commands write are taken by the others, and a talk survives its user."""

import json
import shlex
import sys

import pytest
import torch

from rankloom.hf.generate import continue_texts
from rankloom.hf.models import load_model
from rankloom.train.config import ModelSettings


@pytest.fixture
def merged(run, fine_tuned, tmp_path):
    folder = tmp_path / "merged model: 1"
    assert run("merge", fine_tuned, folder).code == 0
    return folder


def test_a_merged_folder_is_a_model_for_every_command(run, merged, fine_tuned, chats, tmp_path):
    assert len(run("generate", merged, "-p", "say ab", "--json").json) == 1
    assert run("chat", merged, "--max-new-tokens", "3", "--json", input="say ab\n").json[0]["role"] == "user"
    judged = run("eval", merged, f"data={chats}", "--json").json
    assert set(judged) == {"base"}
    assert run("info", merged, "--json").json["kind"] == "model"
    out = tmp_path / "again"
    found = run("train", merged, f"data={chats}", f"out={out}", "r=2", "steps=2", "--json")
    assert found.code == 0, found.err
    assert run("eval", out, "--json").json["adapter"]["loss"] == pytest.approx(found.json["after"]["loss"])
    refused = run("merge", merged, tmp_path / "no")
    assert refused.code == 2
    assert "no adapter is given" in refused.err


def test_a_folder_that_is_nothing_says_what_it_could_be(run, tmp_path):
    (tmp_path / "x").mkdir()
    found = run("generate", tmp_path / "x", "-p", "q")
    assert found.code == 1
    assert all(name in found.err for name in ("config.yaml", "adapter_config.json", "config.json"))


def test_a_quantised_folder_speaks_with_its_own_adapter(run, model, tmp_path):
    small = tmp_path / "small"
    found = run("quantize", f"model={model}", "method=loftq", "r=2", "bits=2", "-o", small, "--json")
    assert found.code == 0, found.err
    asked = ["-p", "say ab", "--max-new-tokens", "6", "--json"]
    one = run("generate", small, *asked).json
    assert one == run("generate", small / "adapter", *asked).json


TALK = "\n   \nsay ab\n/help\n/nothing\n/hel\n/\n/base\n/adapter\nsay cd\n/reset\nsay ef\n/exit\nnot read\n"


def test_a_talk_survives_empty_lines_and_unknown_words(run, fine_tuned):
    found = run("chat", fine_tuned, "--max-new-tokens", "3", input=TALK)
    assert found.code == 0, found.err
    for word in ("/help", "/reset", "/base", "/adapter", "/exit"):
        assert word in found.out
    assert "there is no command /nothing" in found.out
    assert "did you mean '/help'" in found.out
    assert "(base speaks)" in found.out
    said = run("chat", fine_tuned, "--max-new-tokens", "3", "--json", input=TALK).json
    assert [turn["content"] for turn in said if turn["role"] == "user"] == ["say ef"]


def test_base_and_adapter_are_unknown_where_there_is_none(run, model):
    found = run("chat", f"model={model}", input="/base\nsay ab\n")
    assert found.code == 0
    assert "there is no command /base" in found.out


@pytest.mark.parametrize("prompt", ["say", "äöü → 日本", "a b"])
def test_an_answer_comes_in_pieces_that_make_the_whole(model, prompt):
    loaded = load_model(ModelSettings(str(model)))
    pieces = []
    with torch.no_grad():
        [whole] = continue_texts(loaded.model, loaded.tokenizer, [prompt], tell=pieces.append)
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    assert "" not in pieces
    assert continue_texts(loaded.model, loaded.tokenizer, [prompt]) == [whole]


def test_nobody_is_told_of_several_answers(model):
    loaded = load_model(ModelSettings(str(model)))
    pieces = []
    assert len(continue_texts(loaded.model, loaded.tokenizer, ["a", "b"], tell=pieces.append)) == 2
    assert pieces == []


@pytest.mark.parametrize("r", [1, 8])
def test_an_export_states_its_error_in_outputs(run, model, chats, tmp_path, r):
    out = tmp_path / "r"
    run("train", f"model={model}", f"data={chats}", f"out={out}", "steps=4", "lr=1e-2", "r=4")
    found = run("export", out, tmp_path / "e", "--r", r, "--json").json
    assert (found["error"] < 1e-6) == (r == 8)
    assert (found["outputs"]["relative"] < 1e-5) == (r == 8)
    assert found["change"]["relative"] > 10 * found["outputs"]["relative"] or r == 1
    assert "chats" in found["measured_on"]
    shown = run("export", out, tmp_path / "shown", "--r", r).out
    assert "outputs" in shown
    assert "the bare base" in shown


def test_used_folders_are_refused_with_a_remedy_that_is_there(run, model, fine_tuned, tmp_path):
    used = tmp_path / "used"
    for command in (
        ["export", fine_tuned],
        ["quantize", f"model={model}", "store=normal_float"],
        ["merge", fine_tuned],
    ):
        for folder in (fine_tuned, model):
            found = run(*command, "-o", folder)
            assert found.code == 1
            assert "--resume" not in found.err
            assert "another --out" in found.err
        used.mkdir(exist_ok=True)
        (used / "mine.txt").write_text("kept")
        found = run(*command, "-o", used)
        assert found.code == 1
        assert "mine.txt" in found.err
    assert [x.name for x in used.iterdir()] == ["mine.txt"]


def test_quantise_measures_on_text(run, model, chats, tmp_path):
    assert "English text" in run("quantize", f"model={model}", "store=normal_float", "-o", tmp_path / "a").out
    own = run("quantize", "model=microworld", "store=uniform", "-o", tmp_path / "b", "--json").json
    assert "held-out text of its world" in own["measured_on"]
    assert own["error"]["same_choice"] > 0.9
    given = run(
        "quantize", f"model={model}", f"data={chats}", "store=normal_float", "-o", tmp_path / "c", "--json"
    ).json
    assert "chats" in given["measured_on"]
    assert json.dumps(given)


def commands(text):
    return [shlex.split(line.removeprefix("next: ")) for line in text.splitlines() if line.startswith("next: ")]


def test_what_comes_next_runs_when_it_is_pasted(run, model, chats, tmp_path):
    out = tmp_path / "a run"
    trained = run("train", f"model={model}", f"data={chats}", f"out={out}", "r=2", "steps=2", "answer_tokens=4")
    assert trained.code == 0, trained.err
    found = commands(trained.out)
    assert [each[:2] for each in found] == [["rankloom", word] for word in ("eval", "generate", "chat", "merge")]
    for each in found:
        done = run(*each[1:], input="")
        assert done.code == 0, (each, done.err)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "step 2/2" in (out / "train.log").read_text()
    assert "step 2/2" in trained.err
    assert json.loads((out / "run.json").read_text())["curve"] == str(out / "loss.png")


def test_no_merge_is_proposed_where_there_is_no_matrix_and_no_answer_for_classes(run, encoder, tmp_path):
    rows = "".join(f'{{"text": "{w}{n}", "label": "{w}"}}\n' for n in range(8) for w in ("ab", "cd"))
    (tmp_path / "classes.jsonl").write_text(rows)
    given = [f"model={encoder}", f"data={tmp_path / 'classes.jsonl'}", f"out={tmp_path / 'c'}", "steps=2"]
    found = run("train", *given, "method=molora", "n=2", "r=2")
    assert found.code == 0, found.err
    assert [each[1] for each in commands(found.out)] == ["eval"]


def test_without_matplotlib_a_note_says_how_to_get_the_picture(run, model, chats, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = run("train", f"model={model}", f"data={chats}", f"out={tmp_path / 'o'}", "steps=1", "eval_answers=0")
    assert found.code == 0, found.err
    assert "rankloom[plot]" in found.out
    assert not (tmp_path / "o" / "loss.png").exists()


@pytest.mark.parametrize("setting", ["plan.trainable_token_indices=[5,6]", "modules_to_save=embed_tokens"])
def test_what_is_trained_of_tied_embeddings_is_merged(run, model, chats, tmp_path, setting):
    out, merged = tmp_path / "run", tmp_path / "merged"
    trained = run(
        "train", f"model={model}", f"data={chats}", f"out={out}", "r=2", "steps=2", "lr=1e-2", setting, "--json"
    )
    assert trained.code == 0, trained.err
    found = run("merge", out, merged, "--json")
    assert found.code == 0, found.err
    judged = run("eval", merged, f"data={chats}", "--json").json["base"]["loss"]
    assert judged == pytest.approx(run("eval", out, f"data={chats}", "--json").json["adapter"]["loss"], abs=1e-4)
