"""Without a terminal a run speaks in lines, and it always writes them into its folder."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
from train_world import Interrupted, attached, breaking_at, llama, settings, texts

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.train.fit import fit
from rankloom.train.lines import LOG, Lines, clock

LORA = Plan(rl.LoRA(r=3), target_modules=("o_proj",))
STEP = re.compile(r"step (\d+)/5  loss \d+\.\d{4}  lr \d\.\d\de-\d\d  [\d,]+ tok/s  ETA \d:\d\d:\d\d")


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def train(out: Path | None = None, **how):
    chosen = settings(steps=5, lr=0.01, log_every=2, eval_every=4)
    return fit(attached(llama, {"default": LORA}, 1), texts(), settings=chosen, out=out,
               evaluate=texts(1), **how)  # fmt: skip


@pytest.mark.parametrize(
    ("out_is_terminal", "err_is_terminal", "where"), [(False, False, "err"), (False, True, "out"), (True, False, "err")]
)
def test_a_line_per_log_every_and_per_evaluation(monkeypatch, out_is_terminal, err_is_terminal, where) -> None:
    streams = {"out": Stream(out_is_terminal), "err": Stream(err_is_terminal)}
    monkeypatch.setattr(sys, "stdout", streams["out"])
    monkeypatch.setattr(sys, "stderr", streams["err"])
    train()
    lines = streams[where].getvalue().splitlines()
    assert [int(found[1]) for line in lines if (found := STEP.fullmatch(line))] == [1, 2, 4, 5]
    assert [line.split()[1] for line in lines if "evaluated: loss" in line] == ["0/5", "4/5", "5/5"]
    assert "done (steps)" in lines[-1]
    [other] = {"out", "err"} - {where}
    assert streams[other].getvalue() == ""


def test_on_a_terminal_there_is_the_bar_instead(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", Stream(True))
    monkeypatch.setattr(sys, "stderr", err := Stream(True))
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    train()
    assert not STEP.search(err.getvalue())
    assert "5/5" in err.getvalue()


def test_who_takes_the_rows_gets_no_lines(capsys) -> None:
    train(report=lambda row: None)
    assert capsys.readouterr().err == ""


def test_the_folder_holds_the_lines_and_a_resumed_run_goes_on_with_them(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, report=breaking_at(4))
    before = (tmp_path / LOG).read_text()
    assert "step 4/5" in before
    train(tmp_path, resume=True)
    text = (tmp_path / LOG).read_text()
    assert text.startswith(before)
    assert "goes on from step-" in text[len(before) :]
    lines = text.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step ", line) for line in lines)
    assert "done" in lines[-1]
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    train(tmp_path)
    assert (tmp_path / "train-1.log").read_text() == text
    assert "step 1/5" in (tmp_path / LOG).read_text()


def test_time_left_is_that_of_the_steps_here(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    told: list[str] = []
    lines = Lines(told.append, 50, 20)
    now[0] = 130.0
    lines.row({"event": "train", "step": 30, "loss": 1.0, "lr": 1e-3})
    assert told == ["step 30/50  loss 1.0000  lr 1.00e-03  ETA 0:01:00"]
    assert clock(3661) == "1:01:01"
