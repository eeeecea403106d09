"""The folder of a run: one run at a time, nothing in it is written over, and no model's folder is taken for one."""

from __future__ import annotations

import json
import os

import pytest

from rankloom.files.lock import locked
from rankloom.train.report import read_metrics


def words(model, chats, out, *more):
    settings = ("r=2", "steps=3", "batch_size=2", "eval_examples=2", "eval_answers=1", "answer_tokens=2")
    return ("train", f"model={model}", f"data={chats}", f"out={out}", *settings, *more)


@pytest.mark.parametrize("left", ["config.yaml", "metrics.jsonl", "checkpoints", "run.json", "adapter"])
def test_a_run_that_broke_off_anywhere_is_not_written_over(left, run, model, chats, tmp_path):
    out = tmp_path / "out"
    (out / left).mkdir(parents=True) if "." not in left else (out.mkdir(), (out / left).write_text("mine\n"))
    refused = run(*words(model, chats, out))
    assert refused.code == 1
    assert f"already holds a run ({left}): --resume auto goes on with it" in refused.err
    assert os.listdir(out) == [left]


def test_nothing_to_resume_is_said_and_old_metrics_stay(run, model, chats, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n')
    with pytest.warns(UserWarning, match=f"nothing to resume in {out}, starting at step 0"):
        done = run(*words(model, chats, out), "--resume", "auto")
    assert done.code == 0, done.err
    assert (out / "metrics-1.jsonl").read_text() == '{"event": "train", "step": 1}\n'
    rows = read_metrics(out)
    assert [row["event"] for row in rows][0] == "start"
    assert [row["step"] for row in rows if row["event"] == "save"] == [1, 2, 3]
    assert not (out / ".lock.owner").exists()


@pytest.mark.parametrize("resume", [(), ("--resume", "auto")])
def test_a_second_run_in_the_folder_is_told_of_the_first(resume, run, model, chats, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    out = tmp_path / "out"
    with locked(out), ThreadPoolExecutor(1) as pool:
        said = json.loads((out / ".lock.owner").read_text())
        refused = pool.submit(run, *words(model, chats, out), *resume).result()
    assert refused.code == 1
    assert f"{out} is in use by process {said['pid']} on {said['host']!r} since {said['since']}" in refused.err
    assert sorted(os.listdir(out)) == [".lock"]


def test_a_models_folder_is_no_runs_folder(run, model, chats, tmp_path, monkeypatch):
    before = sorted(os.listdir(model))
    monkeypatch.chdir(model)
    for out in (model, "."):
        for resume in ((), ("--resume", "auto")):
            refused = run(*words(model, chats, out), *resume)
            assert refused.code == 1
            assert f"{out} is a model's folder (config.json): give another out=" in refused.err
    assert sorted(os.listdir(model)) == before


def test_what_is_refused_before_it_begins_leaves_no_folder(run, model, chats, tmp_path):
    assert run(*words(model, chats, tmp_path / "out", "lr=-1")).code == 2
    assert run(*words(model, chats, tmp_path / "out", "target_modules=[nowhere]")).code == 2
    assert not (tmp_path / "out").exists()
