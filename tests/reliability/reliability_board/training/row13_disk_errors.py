"""Row 13: whichever operation of the disk fails, what was saved stays good and the run can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rankloom.errors import FileError
from rankloom.files import disk
from rankloom.files.disk import Operation
from rankloom.files.folders import write_folder
from rankloom.train import checkpoint
from rankloom.train.checkpoint import FORM, PLACE, load_checkpoint, steps_in
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.training.crash import logged
from reliability_board.training.row10_kill_while_saving import in_place
from reliability_board.training.world import ENOUGH, SETTINGS, World, ended, plan_of, scratch

SHORT = "short write"
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES, SHORT: errno.ENOSPC}
ONCE = ("EACCES",)
"""Errors that come once; the others stay from then on."""
DELAY = 0.01
"""Seconds by which a slow disk is late."""


def measure(budget: Budget) -> Finding:
    """Fail the k-th operation of a whole run, for each k and each error; look; then go on with a disk that works. And
    one run on a disk that is only slow.
    """
    settings = dataclasses.replace(SETTINGS, steps=4, accumulate=1, eval_every=None)
    world, faults = World("lora", {"default": plan_of("lora")}, settings=settings), []
    with scratch() as folder:
        count = len(logged(lambda: world.run(folder / "logged")))
        whole = ended(world, folder / "whole")
        with disk.watched(_slow):
            faults += [] if ended(world, folder / "slow") == whole else ["a slow disk: another ending"]
        cases = [(k, name) for k in range(count) for name in ERRORS]
        chosen = random.Random(budget.seed).sample(cases, min(len(cases), budget.of(len(cases), 24)))
        tried = 0
        for k, name in sorted(chosen):
            tried += 1
            fault = _failing(world, folder / f"{k} {name}", k, name) or _going_on(world, folder / f"{k} {name}", whole)
            faults += [] if fault is None else [f"{name} at operation {k}: {fault}"]
            if len(faults) == ENOUGH:
                break
    figure = (
        f"{tried - len(faults)} of {tried} failures survived; {count} operations, {len(ERRORS)} errors, a slow disk"
    )
    return Finding(not faults, figure, tuple(faults))


def _failing(world: World, out: Path, k: int, name: str) -> str | None:
    """Run with the fault: it may end well, or say file and reason; what was said to be saved is there and whole."""
    saved = [0]

    def tell(row: Mapping[str, Any]) -> None:
        if row["event"] == "save":
            saved.append(row["step"])

    try:
        with disk.watched(_fault(k, name)):
            world.run(out, tell)
    except FileError as error:
        if str(out) not in str(error) or os.strerror(ERRORS[name]) not in str(error):
            return f"neither file nor reason: {error!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for step in steps_in(out / PLACE):
        try:
            load_checkpoint(out / PLACE / FORM.format(step))
        except FileError as error:
            return f"a broken checkpoint is visible: {error}"
    newest = max(steps_in(out / PLACE), default=0)
    return None if newest >= saved[-1] else f"step {saved[-1]} was saved, step {newest} is the newest"


def _going_on(world: World, out: Path, whole: str) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "nothing to resume")
        try:
            end = ended(world, out)
        except Exception as error:
            return f"it does not go on: {type(error).__name__}: {error}"
    left = [p.name for p in out.rglob(".*.part")]
    return "another ending" if end != whole else f"never swept: {left}" if left else None


def _slow(operation: Operation, perform: Callable[[], None]) -> None:
    time.sleep(DELAY)
    perform()


def _fault(k: int, name: str) -> disk.Watcher:
    """The k-th operation fails, and unless it is one that comes once, all that come after it."""
    done = 0

    def watch(operation: Operation, perform: Callable[[], None]) -> None:
        nonlocal done
        done += 1
        if done <= k or (name in ONCE and done > k + 1):
            perform()
            return
        if name == SHORT and operation.kind in ("write", "append"):
            with operation.path.open("ab") as file:
                file.write(operation.data[: len(operation.data) // 2])
        raise OSError(ERRORS[name], os.strerror(ERRORS[name]), str(operation.path))

    return watch


@contextlib.contextmanager
def _unnoticed() -> Iterator[None]:
    """Errors of a save are swallowed."""

    def careless(target: Path, files: Mapping[str, bytes]) -> None:
        with contextlib.suppress(OSError):
            write_folder(target, files)

    with swapped(checkpoint, "write_folder", careless):
        yield


ROW = Row(
    13,
    "whichever operation of the disk fails, what was saved stays good",
    measure,
    (
        Sabotage("written in its place", lambda: swapped(checkpoint, "write_folder", in_place)),
        Sabotage("errors of a save are swallowed", _unnoticed),
    ),
)
