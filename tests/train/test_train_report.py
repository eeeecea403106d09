"""What a run tells: metrics.jsonl, progress, trackers."""

from __future__ import annotations

import io
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from train_world import Interrupted, attached, breaking_at, llama, mlp, points, settings, texts

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.errors import MissingExtra, SettingsError
from rankloom.train import report
from rankloom.train.fit import fit
from rankloom.train.report import read_metrics

LORA = Plan(rl.LoRA(r=3), target_modules=("o_proj",))


def test_metrics_are_always_written(tmp_path: Path) -> None:
    model = attached(llama, {"default": LORA}, 1)
    chosen = settings(steps=5, lr=0.01, schedule="linear", warmup_steps=0, log_every=2, eval_every=4, save_every=99)
    told: list[Any] = []
    result = fit(model, texts(), settings=chosen, out=tmp_path, evaluate=texts(1), report=told.append)
    rows = read_metrics(tmp_path)
    assert rows == json.loads(json.dumps(told))
    kinds = [(r["event"], r["step"]) for r in rows]
    assert kinds == [
        ("start", 0), ("eval", 0), ("train", 1), ("train", 2), ("train", 4), ("eval", 4), ("save", 4), ("train", 5),
        ("eval", 5), ("save", 5), ("end", 5),
    ]  # fmt: skip
    start, end = rows[0], rows[-1]
    assert start["trainable"] == result.trainable == sum(p.numel() for _, p, _ in model.rankloom.trainable())
    assert start["settings"]["lr"] == 0.01
    assert start["adapters"]["default"]["plan"]["method"] == {"name": "lora", "r": 3}
    assert set(start["versions"]) == {"rankloom", "torch"}
    trained = [r for r in rows if r["event"] == "train"]
    assert [r["loss"] for r in trained] == [result.losses[i] for i in (0, 1, 3, 4)]
    assert [r["lr"] for r in trained] == pytest.approx([0.01, 0.008, 0.004, 0.002])
    assert [r["tokens"] for r in trained] == [36, 72, 144, 180]
    assert [r["epoch"] for r in trained] == [0, 0, 1, 1]
    assert all(r["grad_norm"] > 0 and r["tokens_per_second"] > 0 and r["memory_mb"] > 1 for r in trained)
    assert "penalty" not in trained[0]
    assert end["metrics"] == result.metrics
    assert end["best"] == {"step": result.best.step, "loss": result.best.loss}


def test_what_a_killed_writer_left_is_swept_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / ".metrics.jsonl.abc.part").write_text("half")
    report.MetricsFile(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_penalties_are_told_apart(tmp_path: Path) -> None:
    model = attached(llama, {"default": Plan(rl.AdaLoRA(init_r=3, target_r=2), target_modules=("o_proj",))}, 1)
    plain = fit(attached(llama, {"default": LORA}, 1), texts(), settings=settings(steps=1))
    result = fit(model, texts(), settings=settings(steps=1), out=tmp_path)
    row = next(r for r in read_metrics(tmp_path) if r["event"] == "train")
    assert row["penalty"] > 0.1
    assert row["loss"] == result.losses[0] == plain.losses[0], "the first loss is the base's"


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(mlp(), points(), settings=settings(save_every=3), out=tmp_path, report=breaking_at(6))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 7, "loss": 1.0}\n{"event": "tra')
    fit(mlp(), points(), settings=settings(), out=tmp_path, resume="auto")
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows if r["event"] == "train"] == list(range(1, 13))
    assert [(r["event"], r["step"]) for r in rows if r["event"] in ("start", "resume", "end")] == [
        ("start", 0), ("resume", 6), ("end", 12),
    ]  # fmt: skip


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for ci, shown in (("", True), ("1", False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", Terminal())
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("CI", ci)
        fit(attached(llama, {"default": LORA}, 1), texts(), settings=settings(steps=3), evaluate=lambda m: 0.125)
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
        assert all(part in text for part in ("3/3", "loss 4.", "lr ", "tok/s", "loss 0.125"))
        assert (" MB" in text) == shown


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(mlp(), points(), settings=settings(report_to="tensorboard"), out=tmp_path, evaluate=points(1))
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [s.step for s in read.Scalars("train/loss")] == list(range(1, 13))
    assert [s.value for s in read.Scalars("train/loss")] == pytest.approx(result.losses, rel=1e-6)
    assert len(read.Scalars("eval/loss")) == 2
    with pytest.raises(SettingsError, match="writes below out="):
        fit(mlp(), points(), settings=settings(report_to="tensorboard"))


class Recorder:
    def __init__(self) -> None:
        self.opened: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int]] = []
        self.closed = 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def close(self) -> None:
        self.closed += 1

    def open(self, **values: Any) -> Recorder:
        self.opened = values
        return self

    finish = close


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_trackers_by_one_switch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    functions = {
        "trackio": {"init": recorder.open, "log": recorder.log, "finish": recorder.close},
        "wandb": {"init": recorder.open},
        "mlflow": {
            "start_run": recorder.open, "log_params": lambda p: None, "log_metrics": recorder.log,
            "end_run": recorder.close,
        },
    }  # fmt: skip
    module = types.ModuleType(name)
    vars(module).update(functions[name])
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda n: object())
    result = fit(
        mlp(), points(), settings=settings(report_to=(name,), steps=3), out=tmp_path / "mine", evaluate=points(1)
    )
    assert "mine" in recorder.opened.values()
    assert [(v["train/loss"], s) for v, s in recorder.logged if "train/loss" in v] == list(
        zip(result.losses, [1, 2, 3])
    )
    assert [s for v, s in recorder.logged if "eval/loss" in v] == [0, 3]
    assert recorder.closed == 1


def test_trackers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda n: None)
    with pytest.raises(MissingExtra, match=r"pip install 'rankloom\[track\]'"):
        fit(mlp(), points(), settings=settings(report_to="trackio"))
    with pytest.raises(SettingsError, match="needs the package 'wandb': pip install wandb"):
        fit(mlp(), points(), settings=settings(report_to=("wandb",)))


def test_an_error_closes_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setitem(
        report._OPENERS, "tensorboard", lambda out, config: report.Tracker(recorder.log, recorder.close)
    )
    with pytest.raises(Interrupted):
        fit(
            mlp(),
            points(),
            settings=settings(save_every=3, report_to="tensorboard"),
            out=tmp_path,
            report=breaking_at(3),
        )
    assert recorder.closed == 1
