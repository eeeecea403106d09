"""Row 14: a run that was killed and taken up is bit for bit the run that was not."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankloom.files import disk
from rankloom.files.disk import Operation
from rankloom.train import loop, stream
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.child import Outcome, forked
from reliability_board.training.process import Process, together
from reliability_board.training.world import ENOUGH, World, ended, scratch, warm, worlds

SECONDS = 120.0
KILLED, EQUAL = 128 + signal.SIGKILL, "equal"


def measure(budget: Budget) -> Finding:
    """Each world in one go, and killed and taken up, in processes of their own: at random instants, and within an
    operation of the disk. Of two processes one is killed, and the other must end by itself.
    """
    draw, kills = random.Random(budget.seed), budget.of(20, 1)
    runs = inside = equal = 0
    faults: list[str] = []
    every = list(worlds())
    warm(every[0])
    for world in every:
        if len(faults) >= ENOUGH:
            break
        with scratch() as folder:
            for same, in_save, words in _broken(world, folder, kills, draw):
                runs, equal, inside = runs + 1, equal + same, inside + in_save
                if not same:
                    faults.append(f"{world.name}: {words}")
    figure = (
        f"{equal} of {runs} kills equal bit for bit over {runs // kills} kinds of run; {inside} of them inside a save"
    )
    return Finding(equal == runs, figure, tuple(faults))


def _broken(world: World, folder: Path, kills: int, draw: random.Random) -> Iterator[tuple[bool, bool, str]]:
    """(whether it ended the same, whether a save was cut off, what happened) of every kill."""
    straight = forked(lambda: _counted(world, folder / "straight"), SECONDS)
    for number in range(kills):
        if straight.died is not None:
            yield False, False, f"the run that nobody killed: {straight.died}"
            continue
        out, (whole, count) = folder / str(number), straight.value
        when, codes = _cut_off(world, out, straight.seconds, count, draw)
        half = any(out.rglob(".*.part"))
        how = _fault(codes) or _compared(forked(partial(ended, world, out), SECONDS), whole)
        left = sorted(p.name for p in out.rglob(".*.part"))
        words = f"killed {when}: {how}" + (f"; left behind: {left}" if left else "")
        yield how == EQUAL and not left, half, words


def _cut_off(
    world: World, out: Path, seconds: float, count: int, draw: random.Random
) -> tuple[str, Sequence[int | None]]:
    """Kill one process of a run before it ends; (when, the exit codes)."""
    if draw.random() < 0.5:
        operation = draw.randrange(count)
        when = f"in operation {operation} of {count} of the disk"
        return when, together(world.processes, partial(_dying, world, out, operation))
    rank = draw.randrange(world.processes)
    while True:
        instant = draw.uniform(0, seconds)
        codes = together(world.processes, partial(world.run, out), partial(_kill, rank, instant))
        if any(code != 0 for code in codes):
            return f"in process {rank} after {instant:.3f} s", codes
        shutil.rmtree(out)


def _fault(codes: Sequence[int | None]) -> str | None:
    if None in codes:
        return "a process that lost the other went on"
    return None if KILLED in codes else f"it had ended with {codes}"


def _compared(again: Outcome, whole: str) -> str:
    return again.died or (EQUAL if again.value == whole else "another ending")


def _counted(world: World, out: Path) -> tuple[str, int]:
    """(the ending, how many operations of the disk the run takes, in whichever process)."""
    tally = out.with_name("operations")

    def watch(operation: Operation, perform: Callable[[], None]) -> None:
        perform()
        with tally.open("ab") as file:
            file.write(b".")

    with disk.watched(watch):
        return ended(world, out), tally.stat().st_size


def _kill(rank: int, instant: float, each: Sequence[Process]) -> None:
    time.sleep(instant)
    each[rank].send(signal.SIGKILL)


def _dying(world: World, out: Path, at: int) -> None:
    """Be one process of the run, killed within an operation of the disk: half of the bytes are written."""
    count = itertools.count()

    def watch(operation: Operation, perform: Callable[[], None]) -> None:
        if next(count) == at:
            if operation.kind in ("write", "append"):
                with operation.path.open("ab") as file:
                    file.write(operation.data[: len(operation.data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        perform()

    with disk.watched(watch):
        world.run(out)


def _nothing(*args: Any) -> None:
    return None


ROW = Row(
    14,
    "a run that was killed and taken up is bit for bit the run that was not",
    measure,
    (
        Sabotage("the random state is not restored", lambda: swapped(loop, "set_rng_state", _nothing)),
        Sabotage("the place in the data is not restored", lambda: swapped(stream._Ordered, "restore", _nothing)),
        Sabotage("where processes take turns, it is not", lambda: swapped(stream._Turns, "restore", _nothing)),
    ),
)
