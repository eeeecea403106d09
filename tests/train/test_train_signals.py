"""SIGTERM and SIGINT: the step is finished and saved, the run ends as the signal says, and goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_world import attached, mlp, points, settings

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.errors import Interrupted, Terminated
from rankloom.files.folders import write_folder
from rankloom.train import checkpoint
from rankloom.train.checkpoint import newest_checkpoint
from rankloom.train.fit import fit
from rankloom.train.processes import Processes
from rankloom.train.signals import StopRequest

PLAN = Plan(rl.LoRA(r=2, lora_dropout=0.1))
CHOSEN = settings(accumulate=1, eval_every=4, patience=9, save_every=99)
ENDINGS = {signal.SIGTERM: Terminated, signal.SIGINT: Interrupted}


def sending(number: int, event: str, step: int) -> Callable[[Any], None]:
    def tell(row: Any) -> None:
        if (row["event"], row["step"]) == (event, step):
            os.kill(os.getpid(), number)

    return tell


def go(out: Path, **kwargs: Any) -> Any:
    model = attached(mlp, {"default": PLAN}, 1)
    usual = {"settings": CHOSEN, "evaluate": points(3), "out": out, "resume": "auto"}
    return fit(model, points(), **{**usual, **kwargs})


def rows(out: Path) -> list[Any]:
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: r[k] for k in ("event", "step", "loss", "metrics") if k in r} for r in told]


@pytest.mark.parametrize("number", ENDINGS)
@pytest.mark.parametrize(("event", "step"), [("train", 1), ("train", 6), ("train", 12), ("start", 0)])
def test_the_step_is_saved_and_the_run_goes_on_exactly(number: int, event: str, step: int, tmp_path: Path) -> None:
    handlers = [signal.getsignal(n) for n in ENDINGS]
    straight = go(tmp_path / "straight")
    with pytest.raises(ENDINGS[number], match=r"after step \d+; resume='auto' goes on") as caught:
        go(tmp_path / "broken", report=sending(number, event, step))
    assert getattr(caught.value, "code", 143) == 143
    assert [signal.getsignal(n) for n in ENDINGS] == handlers
    found = newest_checkpoint(tmp_path / "broken" / "checkpoints")
    assert found is not None
    assert found.step == step
    again = go(tmp_path / "broken")
    assert (again.losses, again.metrics, again.best.loss) == (straight.losses, straight.metrics, straight.best.loss)
    one, two = (newest_checkpoint(tmp_path / n / "checkpoints") for n in ("straight", "broken"))
    assert all(torch.equal(one.weights[k], two.weights[k]) for k in one.weights)
    assert [r for r in rows(tmp_path / "broken") if r["event"] in ("train", "eval")] == [
        r for r in rows(tmp_path / "straight") if r["event"] in ("train", "eval")
    ]


@pytest.mark.parametrize("at", range(5))
def test_an_evaluation_is_left_and_made_good(at: int, tmp_path: Path) -> None:
    """The one before, two that are due, the one that is due at the end; the one after `finish` does not exist here."""

    def judge(calls: list[int], kill: bool) -> Callable[[Any], float]:
        def evaluate(model: Any) -> float:
            calls.append(len(calls))
            if kill and calls[-1] == at:
                os.kill(os.getpid(), signal.SIGTERM)
                calls.append(99)
            return float(next(p for _, p, _ in model.rankloom.trainable()).detach().sum())

        return evaluate

    straight = go(tmp_path / "straight", evaluate=judge([], False))
    calls: list[int] = []
    if at < 4:
        with pytest.raises(Terminated):
            go(tmp_path / "broken", evaluate=judge(calls, True))
        assert 99 not in calls
    again = go(tmp_path / "broken", evaluate=judge([], False))
    assert (again.losses, again.metrics, again.best.step) == (straight.losses, straight.metrics, straight.best.step)


def test_the_evaluation_after_the_last_step_is_in_its_checkpoint(tmp_path: Path) -> None:
    chosen = settings(accumulate=1, steps=11, eval_every=4, save_every=99)

    def standing(out: Path) -> dict[str, Any]:
        found = newest_checkpoint(out / "checkpoints")
        assert found is not None
        return {**found.state(torch.device("cpu"))["standing"], "seconds": 0}

    go(tmp_path / "straight", settings=chosen)
    with pytest.raises(Terminated):
        go(tmp_path / "broken", settings=chosen, report=sending(signal.SIGTERM, "train", 11))
    assert standing(tmp_path / "broken")["judged"] == 8
    for _ in range(2):
        result = go(tmp_path / "broken", settings=chosen)
        assert "loss" in result.metrics["after"]
        assert standing(tmp_path / "broken") == standing(tmp_path / "straight")


def test_a_second_signal_finds_the_handlers_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Exception):
        pass

    def handler(number: int, frame: Any) -> None:
        raise Mine

    def killed_in_saving(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write_folder(*args)

    monkeypatch.setattr(checkpoint, "write_folder", killed_in_saving)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Mine):
            go(tmp_path, report=sending(signal.SIGINT, "train", 3))
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    monkeypatch.undo()
    assert go(tmp_path).losses == go(tmp_path / "straight").losses


def test_a_signal_too_late_to_matter_still_ends_the_program(tmp_path: Path) -> None:
    with pytest.raises(Terminated, match="SIGTERM: the run was complete"):
        go(tmp_path, report=sending(signal.SIGTERM, "end", 12))


def test_without_a_folder_or_in_a_thread_handlers_stay(tmp_path: Path) -> None:
    seen: list[Any] = []

    def tell(row: Any) -> None:
        seen.append(signal.getsignal(signal.SIGTERM))

    standing = signal.getsignal(signal.SIGTERM)
    go(None, resume=False, report=tell, settings=dataclasses.replace(CHOSEN, save_every=None))
    thread = threading.Thread(target=go, args=(tmp_path / "a",), kwargs={"report": tell})
    thread.start()
    thread.join()
    assert seen
    assert set(seen) == {standing}
    assert newest_checkpoint(tmp_path / "a" / "checkpoints").step == 12


@pytest.mark.parametrize(("mine", "theirs", "agreed"), [(15, 0, 15), (0, 15, 15), (0, 0, None), (2, 15, 15)])
def test_processes_agree(mine: int, theirs: int, agreed: int | None) -> None:
    class Two(Processes):
        def sum(self, *numbers: float) -> list[float]:
            return [a + b for a, b in zip(numbers, (theirs == signal.SIGTERM, theirs == signal.SIGINT))]

    asked = StopRequest()
    asked.number = mine or None
    assert asked.agree(Two()) == (agreed is not None)
    assert asked.number == agreed


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert go(tmp_path, report=sending(signal.SIGINT, "train", 3)).steps == 12
    finally:
        signal.signal(signal.SIGINT, before)
