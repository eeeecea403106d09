"""What a run keeps without being asked to: checkpoints, old metrics, its folder for itself, and a good one on a full
disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pty
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_world import Forks
from train_world import attached, mlp, points, settings

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.errors import FileError, StateError, Terminated
from rankloom.files import disk, lock
from rankloom.files.lock import check_free, locked
from rankloom.train.checkpoint import newest_checkpoint, steps_in
from rankloom.train.fit import fit
from rankloom.train.loop import Loop
from rankloom.train.processes import Processes
from rankloom.train.report import read_metrics
from rankloom.train.signals import HEARD, StopRequest

PLAN = Plan(rl.LoRA(r=2, lora_dropout=0.1))
CHOSEN = settings(accumulate=1)


def go(out: Path | None, batches: Any = None, **kwargs: Any) -> Any:
    model = attached(mlp, {"default": PLAN}, 1)
    return fit(model, points() if batches is None else batches, **{"settings": CHOSEN, "out": out, **kwargs})


def saves(out: Path) -> list[int]:
    return [row["step"] for row in read_metrics(out) if row["event"] == "save"]


class Stop(Exception):
    pass


def stopping(step: int) -> Callable[[Any], None]:
    def tell(row: Any) -> None:
        if (row["event"], row["step"]) == ("train", step):
            raise Stop

    return tell


# Checkpoints without being asked.


@pytest.mark.parametrize(
    ("steps", "expected"), [(3, [1, 2, 3]), (12, [2, 4, 6, 8, 10, 12]), (25, [3, 6, 9, 12, 15, 18, 21, 24, 25])]
)
def test_a_tenth_of_the_steps(steps: int, expected: list[int], tmp_path: Path) -> None:
    go(tmp_path, settings=settings(steps=steps, accumulate=1))
    assert saves(tmp_path) == expected
    assert read_metrics(tmp_path)[0]["checkpoints"] == {"steps": -(-steps // 10), "seconds": 600.0}


def test_ten_minutes_where_a_tenth_takes_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(row: Any) -> None:
        now[0] += 250 if row["event"] == "train" else 0

    go(tmp_path, settings=settings(steps=100, accumulate=1), report=slow)
    assert saves(tmp_path)[:6] == [3, 6, 9, 10, 13, 16]


def test_said_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `save_every` no clock counts; without `out` there is nothing to keep."""
    now = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    go(tmp_path, settings=settings(accumulate=1, save_every=5))
    assert saves(tmp_path) == [5, 10, 12]
    assert read_metrics(tmp_path)[0]["checkpoints"] == {"steps": 5, "seconds": None}
    told: list[Any] = []
    go(None, report=told.append)
    assert told[0]["checkpoints"] is None
    assert not [row for row in told if row["event"] == "save"]


def test_the_clock_of_the_main_process_counts_for_all() -> None:
    for main, theirs, due in ((True, 0, True), (False, 0, False), (False, 1, True)):
        loop = object.__new__(Loop)

        class Two(Processes):
            def sum(self, *numbers: float, theirs: int = theirs) -> list[float]:
                return [n + theirs for n in numbers]

        loop.out, loop.settings, loop.processes = Path("x"), settings(steps=100), Two(rank=0 if main else 1, world=2)
        loop.run = type("Run", (), {"step": 7})()
        loop._saved_when = time.monotonic() - 700
        assert loop._save_is_due() is due


def test_saving_changes_nothing(tmp_path: Path) -> None:
    often = go(tmp_path / "a", settings=settings(accumulate=1, save_every=1))
    assert often.losses == go(tmp_path / "b", settings=settings(accumulate=1, save_every=99)).losses == go(None).losses


# Signals.


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM"])
def test_the_exit_code_is_the_signals(name: str, tmp_path: Path) -> None:
    number = getattr(signal, name)

    def tell(row: Any) -> None:
        if (row["event"], row["step"]) == ("train", 5):
            os.kill(os.getpid(), number)

    chosen = settings(accumulate=1, save_every=99)
    before = [signal.getsignal(n) for n in HEARD]
    with pytest.raises(Terminated, match=f"{name}: stopped after step 5; resume='auto' goes on") as caught:
        go(tmp_path, report=tell, settings=chosen)
    assert caught.value.code == 128 + number
    assert [signal.getsignal(n) for n in HEARD] == before
    assert steps_in(tmp_path / "checkpoints") == [5]
    assert go(tmp_path, resume="auto", settings=chosen).losses == go(None).losses


@pytest.mark.parametrize("second", ["SIGHUP", "SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize("first", ["SIGHUP", "SIGUSR1"])
def test_a_notice_never_ends_at_once(first: str, second: str, tmp_path: Path) -> None:
    """A terminal that goes sends SIGHUP twice; a scheduler sends SIGTERM after SIGUSR1: the step is saved all the same."""

    def tell(row: Any) -> None:
        if (row["event"], row["step"]) == ("train", 5):
            os.kill(os.getpid(), getattr(signal, first))
            os.kill(os.getpid(), getattr(signal, second))

    with pytest.raises(Terminated) as caught:
        go(tmp_path, report=tell, settings=settings(accumulate=1, save_every=99))
    assert caught.value.code == 128 + getattr(signal, first)
    assert steps_in(tmp_path / "checkpoints") == [5]


def test_an_urgent_one_twice_ends_at_once_whatever_came_before() -> None:
    asked, got = StopRequest(), []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        asked.listen()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert (asked.number, got) == (signal.SIGUSR1, [])
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        asked.put_back()
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    found = Forks()
    yield found
    found.close()


@pytest.mark.skipif(os.name != "posix", reason="terminals")
def test_a_terminal_that_goes_away(forks: Forks, tmp_path: Path) -> None:
    """The kernel sends SIGHUP; everything that the run then prints fails; the step is saved, the code is 129."""
    out, (ours, theirs) = tmp_path / "run", pty.openpty()
    run = forks.start(out, os.ttyname(theirs), steps=5000, save_every=9999)
    os.close(theirs)
    os.close(ours)
    assert forks.code(run) == 129
    assert newest_checkpoint(out / "checkpoints").step == max(r["step"] for r in read_metrics(out) if "loss" in r)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_instant_at_most_a_tenth_is_lost(forks: Forks, tmp_path: Path) -> None:
    """SIGKILL again and again: each time the run goes on from a checkpoint no more than a tenth behind, to the very
    end that an undisturbed one comes to, and the lock that the dead one held hinders nobody."""
    chosen, out, draw = settings(steps=60, accumulate=1), tmp_path / "run", random.Random(0)
    for _ in range(6):
        run = forks.start(out, after=draw.randrange(1, 15), steps=60)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(run, signal.SIGKILL)
        assert forks.code(run) == -signal.SIGKILL
        done = max((r["step"] for r in read_metrics(out) if r["event"] == "train"), default=0)
        assert done - max(steps_in(out / "checkpoints"), default=0) <= 6
        assert (out / lock.OWNER).exists()
        if done > 50:
            break
    assert done > 6
    again = go(out, settings=chosen, resume="auto")
    assert again.losses == go(None, settings=chosen).losses
    assert not (out / lock.OWNER).exists()


# Nothing to resume.


def test_nothing_to_resume_is_said_and_old_metrics_stay(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"nothing to resume in {tmp_path}, starting at step 0"):
        go(tmp_path, resume="auto", settings=settings(accumulate=1, steps=3))
    whole = (tmp_path / "metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    for number in (1, 2):
        go(tmp_path, settings=settings(accumulate=1, save_every=99), report=None)
        assert (tmp_path / "metrics-1.jsonl").read_text() == whole
        assert (tmp_path / f"metrics-{number}.jsonl").exists()
        shutil.rmtree(tmp_path / "checkpoints")
    assert read_metrics(tmp_path)[0]["event"] == "start"


def test_a_resumed_run_goes_on_in_its_metrics(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        go(tmp_path, report=stopping(7))
    go(tmp_path, resume="auto")
    rows = [(r["event"], r["step"]) for r in read_metrics(tmp_path) if r["event"] in ("start", "train", "resume")]
    assert rows == [
        ("start", 0),
        *(("train", i) for i in range(1, 7)),
        ("resume", 6),
        *(("train", i) for i in range(7, 13)),
    ]
    assert not (tmp_path / "metrics-1.jsonl").exists()


def test_another_runs_checkpoint_does_not_take_over_the_metrics_of_this_folder(tmp_path: Path) -> None:
    go(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text('{"event": "train", "step": 1}\n')
    go(tmp_path / "b", resume=tmp_path / "a" / "checkpoints" / "step-00000010")
    assert (tmp_path / "b" / "metrics-1.jsonl").read_text() == '{"event": "train", "step": 1}\n'
    assert read_metrics(tmp_path / "b")[0]["event"] == "resume"


# One run in a folder.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_second_run_is_refused_and_told_of_the_first(forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = forks.start(out, steps=5000)
    (tmp_path / "link").symlink_to(out)
    before = (out / lock.OWNER).read_bytes()
    for where, resume in ((out, "auto"), (out, False), (tmp_path / "link", "auto")):
        with pytest.raises(StateError, match=rf"is in use by process {run} on '.+' since \d{{4}}-"):
            go(where, resume=resume)
    with pytest.raises(StateError, match="is in use by process"):
        check_free(out)
    assert (out / lock.OWNER).read_bytes() == before
    os.kill(run, signal.SIGUSR1)
    assert forks.code(run) == 138
    assert [r["event"] for r in read_metrics(out)].count("start") == 1
    check_free(out)


def test_a_thread_of_the_same_process_is_refused_too(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with locked(tmp_path), ThreadPoolExecutor(1) as pool, pytest.raises(StateError, match=f"process {os.getpid()} on"):
        pool.submit(go, tmp_path).result()


def test_a_job_may_hold_it_around_its_run_and_it_ends_with_the_outer_one(tmp_path: Path) -> None:
    with locked(tmp_path):
        go(tmp_path)
        assert json.loads((tmp_path / lock.OWNER).read_bytes())["pid"] == os.getpid()
        with pytest.raises(StateError):
            go(tmp_path)
    assert not (tmp_path / lock.OWNER).exists()
    check_free(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_the_run_forked_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Workers of a loader outlive a killed run for some seconds."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - the run, which forks a worker and dies
        with locked(tmp_path):
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(write, str(worker).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    worker = int(os.read(read, 20))
    try:
        with locked(tmp_path):
            assert json.loads((tmp_path / lock.OWNER).read_bytes())["pid"] == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_disk_without_locks_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def none(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available.: see to it that no other run"):
        assert go(tmp_path).steps == 12

    def denied(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", denied)
    with pytest.raises(FileError, match=r"\.lock: cannot be locked: Permission denied"):
        go(tmp_path / "b")


# A full disk.


def full_at(name: str, number: int) -> Any:
    """No space for the `number`-th write to a file of this name, nor for any write after it."""
    count = iter(range(1, 999))

    def watch(operation: disk.Operation, perform: Callable[[], None]) -> None:
        if operation.kind in ("write", "append") and (
            watch.full or (operation.path.name == name and next(count) == number)
        ):  # type: ignore[attr-defined]
            watch.full = True  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        perform()

    watch.full = False  # type: ignore[attr-defined]
    return watch


@pytest.mark.parametrize(
    ("name", "number"),
    [("weights.safetensors", 1), ("weights.safetensors", 3), ("manifest.json", 2), ("metrics.jsonl", 1), ("metrics.jsonl", 9),
     (".lock.owner", 1)],
)  # fmt: skip
def test_a_full_disk_names_the_file_and_the_last_good_checkpoint_stays(name: str, number: int, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with disk.watched(full_at(name, number)), pytest.raises(FileError, match=rf"{name}.*No space left on device; free"):
        go(out, settings=settings(accumulate=1, save_every=2, keep=50))
    good = steps_in(out / "checkpoints")
    if name in ("weights.safetensors", "manifest.json"):
        assert good == list(range(2, 2 * number, 2))
    if good:
        assert newest_checkpoint(out / "checkpoints").step == good[-1]
    again = go(out, resume="auto", settings=settings(accumulate=1, save_every=2, keep=50))
    assert again.losses == go(None).losses
    assert not list(out.rglob(".*.part"))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EDQUOT, errno.EIO])
def test_other_troubles_of_a_disk_are_named(code: int, tmp_path: Path) -> None:
    def watch(operation: disk.Operation, perform: Callable[[], None]) -> None:
        if operation.kind == "make" and "step-" in operation.path.name:
            raise OSError(code, os.strerror(code), str(operation.path))
        perform()

    with disk.watched(watch), pytest.raises(FileError, match=rf"step-00000002.*cannot be written: {os.strerror(code)}"):
        go(tmp_path)


def test_frozen_settings_tell_their_defaults() -> None:
    assert (dataclasses.replace(CHOSEN, steps=1000).save_steps, CHOSEN.save_seconds) == (100, 600.0)
    assert dataclasses.replace(CHOSEN, save_every=7).save_steps == 7
