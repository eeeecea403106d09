"""Bad input: one clear message on standard error, an exit code that is not 0, nothing half-written."""

import errno
import json
import os

import pytest
from cli_tiny import llama

from rankloom.files.disk import watched

USAGE, RUNTIME = 2, 1


@pytest.fixture
def fails(run, tmp_path):
    """Runs a command that must fail: checks code, the message's shape, and that the output folder stays unmade."""

    def call(*arguments, code, out=tmp_path / "out"):
        before = sorted(p.name for p in tmp_path.iterdir())
        found = run(*arguments)
        assert found.code == code, (found.code, found.out, found.err)
        errors = [line for line in found.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, found.err
        assert "Traceback" not in found.err
        assert not found.out.startswith("{")
        assert not out.exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        return errors[0]

    return call


@pytest.fixture
def train(fails, model, chats, tmp_path):
    def call(*changes, code, data=chats, model=model):
        return fails("train", f"model={model}", f"data={data}", f"out={tmp_path / 'out'}", *changes, code=code)

    return call


def test_missing_files(train, fails, tmp_path):
    assert "did you mean 'chats.jsonl'" in train(code=RUNTIME, data=tmp_path / "chat.jsonl")
    assert "no such folder" in train(code=RUNTIME, model=tmp_path / "nowhere")
    assert "no such file" in fails("train", tmp_path / "run.yaml", code=RUNTIME)
    assert "no such file" in fails("merge", tmp_path / "run", "-o", tmp_path / "out", code=RUNTIME)


def test_a_hub_model_offline(train, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = train(code=RUNTIME, model="nobody/nothing")
    assert "HF_HUB_OFFLINE=1" in message
    assert "nobody/nothing" in message


def test_a_broken_line_is_named(train, chats):
    chats.write_text(chats.read_text() + '{"prompt": "a", "completion"\n')
    message = train(code=RUNTIME)
    assert "chats.jsonl, line 13" in message
    assert "broken JSON" in message or "not JSON" in message


def test_empty_data(train, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no records" in train(code=RUNTIME, data=tmp_path / "empty.jsonl")


def test_one_record_cannot_be_judged(train, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "eval_source" in train(code=RUNTIME, data=tmp_path / "one.jsonl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method=dorra", "did you mean 'dora'"),
        ("lrr=1", "did you mean 'lr'"),
        ("target_modules=[q_porj]", "did you mean 'q_proj'"),
        ("r=0", "expected a whole number from 1 to 65,536"),
        ("steps=two", "train.steps='two': expected a whole number"),
        ("model.task=encoder", "no loss of its own"),
        ("model.device=cud", "model.device"),
        ("rules=[budgt]", "did you mean 'budget'"),
    ],
)
def test_wrong_settings(train, change, message):
    assert message in train(change, code=USAGE)


def test_unknown_column_method_status_and_kind(train, fails, fine_tuned, tmp_path):
    assert "did you mean" in fails("methods", "dorra", code=USAGE)
    assert "planned" in fails("systems", "--status", "done", code=USAGE)
    assert "lora" in fails("export", fine_tuned, "-o", tmp_path / "out", "--as", "lore", code=USAGE)
    assert "format" in train("data.format=alpacca", code=USAGE)


def test_nothing_given_says_what_to_give(fails, model, chats):
    assert "model=microworld" in fails("train", f"data={chats}", "out=x", code=USAGE)
    assert "data=FILE" in fails("train", f"model={model}", "out=x", code=USAGE)
    assert "out=FOLDER" in fails("train", f"model={model}", f"data={chats}", code=USAGE)
    assert "no adapter" in fails("merge", f"model={model}", "-o", "x", code=USAGE)


def test_the_wrong_base(fails, fine_tuned, encoder, tmp_path):
    message = fails("merge", fine_tuned, f"model={encoder}", "task=encoder", "-o", tmp_path / "out", code=RUNTIME)
    assert "tiny" in message  # the base that it was made for


def test_an_adapter_is_not_a_model(fails, fine_tuned):
    assert "adapter" in fails("plan", f"model={fine_tuned / 'adapter'}", code=RUNTIME)


def test_a_tokenizer_without_pad_or_end(train, tmp_path_factory):
    bare = llama(tmp_path_factory.mktemp("bare") / "m")
    assert "neither a pad token nor an EOS token" in train(code=RUNTIME, model=bare)


def test_a_tokenizer_without_pad_takes_the_end_token(run, chats, tmp_path, tmp_path_factory):
    model = llama(tmp_path_factory.mktemp("nopad") / "m", eos_token="<e>")
    found = run("train", f"model={model}", f"data={chats}", f"out={tmp_path / 'r'}", "steps=2", "--json")
    assert found.code == 0, found.err
    assert "no pad token" in " ".join(found.json["notes"])


def test_a_file_in_place_of_the_folder(run, model, chats, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "deeper"):
        found = run("train", f"model={model}", f"data={chats}", f"out={out}", "steps=2")
        assert found.code == RUNTIME
        assert "is a file" in found.err
    assert (tmp_path / "taken").read_text() == "mine"


def test_no_permission(run, model, chats, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "out"))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    found = run("train", f"model={model}", f"data={chats}", f"out={tmp_path / 'out'}", "steps=2")
    assert found.code == RUNTIME
    assert "Permission denied" in found.err
    assert "another out=" in found.err


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_start_of_a_run(run, model, chats, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", full)
    out = tmp_path / "out"
    found = run("train", f"model={model}", f"data={chats}", f"out={out}", "steps=2")
    assert found.code == RUNTIME
    assert "No space left on device" in found.err
    assert not list(out.iterdir())


def test_a_full_disk_while_merging(run, fine_tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", full)
    found = run("merge", fine_tuned, "-o", tmp_path / "merged")
    assert found.code == RUNTIME
    assert "No space left on device" in found.err
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_a_full_disk_while_the_adapter_is_saved(run, model, chats, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def no_room(operation, perform):
        if ".adapter." in str(operation.path) and operation.kind == "write":
            full()
        perform()

    with watched(no_room):
        found = run("train", f"model={model}", f"data={chats}", f"out={out}", "steps=2")
    assert found.code == RUNTIME
    assert "No space left on device" in found.err
    assert not (out / "adapter").exists()
    assert not (out / "run.json").exists()
    assert not list(out.glob(".adapter*"))


def test_an_existing_model_is_never_overwritten(run, fine_tuned, model, tmp_path):
    weights = (model / "model.safetensors").read_bytes()
    found = run("merge", fine_tuned, "-o", model)
    assert found.code == RUNTIME
    assert "is a model's folder" in found.err
    assert (model / "model.safetensors").read_bytes() == weights


def test_a_damaged_adapter_is_refused(run, fine_tuned, tmp_path):
    file = fine_tuned / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    found = run("generate", fine_tuned, "-p", "x")
    assert found.code == RUNTIME
    assert "adapter_model.safetensors" in found.err


def test_a_record_that_is_none(run, fine_tuned):
    (fine_tuned / "run.json").write_text(json.dumps([1]))
    found = run("info", fine_tuned)
    assert found.code == RUNTIME
    assert "run.json" in found.err


def test_two_paths_are_one_too_many(fails):
    assert "one path at most" in fails("train", "a.yaml", "b.yaml", code=USAGE)


def test_no_folder_to_write(fails, fine_tuned, tmp_path):
    assert "--out FOLDER" in fails("merge", fine_tuned, code=USAGE)
    assert "--out FOLDER" in fails("merge", code=USAGE)
