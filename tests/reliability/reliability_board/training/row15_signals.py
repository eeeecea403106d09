"""Row 15: SIGTERM and SIGINT finish the step, save it and end the run; a second one ends it at once."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankloom.train import fit
from rankloom.train.checkpoint import FORM, PLACE, load_checkpoint, steps_in
from rankloom.train.report import read_metrics
from rankloom.train.signals import StopRequest
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.training.process import Process, start, together
from reliability_board.training.world import SETTINGS, World, ended, plan_of, scratch

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 138}
URGENT = (signal.SIGTERM, signal.SIGINT)
"""Those of which a second one ends the run at once."""
LIMIT, AT_ONCE = 60.0, 1.0
STEP = 0.02
"""Seconds by which a step is longer than it was, so that most signals meet one."""


def measure(budget: Budget) -> Finding:
    """One signal at a random instant of a run, told to one of its processes; then two, the second while the step that
    goes on for ever goes on.
    """
    draw = random.Random(budget.seed)
    one = World("dylora", {"default": plan_of("dylora")}, settings=dataclasses.replace(SETTINGS, save_every=99))
    two = dataclasses.replace(one, processes=2)
    faults: list[str] = []
    single, shared, double = budget.of(50, 6), budget.of(20, 2), budget.of(10, 2)
    with scratch() as folder:
        whole = ended(one, folder / "whole")
        faults += _signals(one, folder / "one", single, whole, draw)
        faults += _signals(two, folder / "two", shared, ended(two, folder / "whole of two"), draw)
        slowest = 0.0
        for number in range(double):
            which = draw.choice(URGENT)
            out = folder / f"twice {number}"
            fault, took = _twice(one, out, which)
            slowest, fault = max(slowest, took), fault or _going_on(one, out, whole)
            faults += [] if fault is None else [f"{which.name} twice: {fault}"]
    tries = single + shared + double
    figure = (
        f"{tries - len(faults)} of {tries} ended as documented and went on bit for bit, {shared} of them in two "
        f"processes; the second signal took {slowest:.2f} s at most"
    )
    return Finding(not faults, figure, tuple(faults))


def _signals(world: World, folder: Path, count: int, whole: str, draw: random.Random) -> Iterator[str]:
    """What went wrong with `count` runs that were each sent a signal."""
    span = _span(world, folder / "span")
    for number in range(count):
        which, wait, rank = draw.choice(list(CODES)), draw.uniform(0, span), draw.randrange(world.processes)
        out = folder / str(number)
        fault = _once(world, out, which, wait, rank) or _going_on(world, out, whole)
        if fault is not None:
            yield f"{which.name} to process {rank} of {world.processes} after {wait:.2f} s: {fault}"


def _slow(row: Mapping[str, Any]) -> None:
    if row["event"] == "train":
        time.sleep(STEP)


def _wait_for(path: Path) -> None:
    limit = time.perf_counter() + LIMIT
    while not path.exists() and time.perf_counter() < limit:
        time.sleep(0.002)


def _run(world: World, out: Path, then: Callable[[Sequence[Process]], object]) -> list[int | None]:
    """Exit codes of a run; `then` is called once it has begun: before, there is nothing to save."""

    def begun(each: Sequence[Process]) -> None:
        _wait_for(out / "metrics.jsonl")
        then(each)

    return together(world.processes, partial(world.run, out, _slow), begun)


def _span(world: World, out: Path) -> float:
    """Seconds that a run takes, once it has begun."""
    began: list[float] = []
    _run(world, out, lambda each: began.append(time.perf_counter()))
    return time.perf_counter() - began[0]


def _once(world: World, out: Path, which: signal.Signals, wait: float, rank: int) -> str | None:
    def tell(each: Sequence[Process]) -> None:
        time.sleep(wait)
        each[rank].send(which)

    codes = _run(world, out, tell)
    trained = max((row["step"] for row in read_metrics(out) if row["event"] == "train"), default=0)
    documented = {CODES[which], 0} if trained == world.settings.steps else {CODES[which]}
    if not documented.issuperset(codes):
        return f"exit codes {codes}"
    newest = max(steps_in(out / PLACE), default=-1)
    if newest != trained:
        return f"{trained} steps were done, and the newest checkpoint is of step {newest}"
    return None


def _twice(world: World, out: Path, which: signal.Signals) -> tuple[str | None, float]:
    """(what is wrong, seconds from the second signal to the end)."""
    here = out.with_name(f"{out.name} hangs")

    def hang(row: Mapping[str, Any]) -> None:
        if row["event"] == "train" and row["step"] == 3:
            here.touch()
            time.sleep(LIMIT)

    process = start(lambda: world.run(out, hang))
    _wait_for(here)
    process.send(which)
    time.sleep(0.05)
    began = time.perf_counter()
    process.send(which)
    code = process.end(5 * AT_ONCE)
    took = time.perf_counter() - began
    if code != CODES[which] or took > AT_ONCE:
        return f"exit code {code} after {took:.2f} s", took
    return None, took


def _going_on(world: World, out: Path, whole: str) -> str | None:
    for step in steps_in(out / PLACE):
        load_checkpoint(out / PLACE / FORM.format(step))
    return None if ended(world, out) == whole else "another ending"


def _stubborn(asked: StopRequest, number: int, frame: Any) -> None:
    asked.number = number


ROW = Row(
    15,
    "SIGTERM and SIGINT finish the step, save it and end the run; a second one ends it at once",
    measure,
    (
        Sabotage(
            "nobody listens", lambda: swapped(fit, "listening", lambda wanted: contextlib.nullcontext(StopRequest()))
        ),
        Sabotage("a second signal changes nothing", lambda: swapped(StopRequest, "_hear", _stubborn)),
    ),
)
