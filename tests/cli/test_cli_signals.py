"""`rankloom train` under signals: exit codes, the checkpoint, and `--resume auto` afterwards."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
from reliability_board.training.process import start

from rankloom.train.checkpoint import newest_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
def test_a_signal_is_an_exit_code_a_checkpoint_and_a_run_that_goes_on(number, code, run, model, chats, tmp_path):
    from rankloom.cli import app

    def words(out):
        return [
            "train",
            f"model={model}",
            f"data={chats}",
            f"out={out}",
            "r=2",
            "steps=60",
            "batch_size=4",
            "log_every=1",
        ]

    straight = run(*words(tmp_path / "straight"), "--json")
    assert straight.code == 0, straight.err
    out, said = tmp_path / "out", tmp_path / "said"

    def child():
        sys.stderr = said.open("w", buffering=1)
        app(words(out))

    process = start(child)
    limit = time.perf_counter() + 300
    while '"train"' not in (text := (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""):
        assert time.perf_counter() < limit, text
        time.sleep(0.005)
    process.send(number)
    assert process.end(60) == code
    assert f"{number.name}: stopped after step" in said.read_text()
    found = newest_checkpoint(out / "checkpoints")
    assert found is not None
    assert 0 < found.step < 60
    assert not (out / "adapter").exists()
    again = run(*words(out), "--resume", "auto", "--json")
    assert again.code == 0, again.err
    assert again.json["after"] == straight.json["after"]
    assert again.json["final_loss"] == straight.json["final_loss"]
    ends = [newest_checkpoint(folder / "checkpoints").weights for folder in (out, tmp_path / "straight")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])
