"""Row 10: a kill −9 while a checkpoint is saved loses nothing."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rankloom.errors import FileError
from rankloom.files import disk
from rankloom.files.folders import discard, make_parents, write_folder
from rankloom.train import checkpoint
from rankloom.train.checkpoint import load_checkpoint, newest_checkpoint, prune, save_checkpoint, steps_in
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.child import forked
from reliability_board.training.world import ENOUGH, scratch

NUMBERS, KEEP = 1 << 18, 2
"""Values of the adapter (1 MB); the optimizer's memory is twice that."""
LONGEST = 0.08
"""Seconds after which a writer is killed at the latest: some saves."""


def measure(budget: Budget) -> Finding:
    """A writer saves and prunes until it is killed at a random instant; then a reader looks; the next one goes on."""
    draw, kills = random.Random(budget.seed), budget.of(1000, 100)
    faults, inside, newest = [], 0, 0
    with scratch() as folder:
        root, said = folder / "checkpoints", folder / "said"
        save_checkpoint(root, 1, *_content(1))
        said.write_text("1\n")
        for number in range(kills):
            end = forked(lambda: _write(root, said), draw.uniform(0.005, LONGEST))
            inside += any(root.glob(".*.part"))
            fault, step = _look(root, int(said.read_text().split()[-1]))
            newest += step == max(steps_in(root), default=0)
            if end.died != "hang":
                fault = f"the writer ended by itself: {end.died}"
            if fault is not None:
                faults.append(f"kill {number}: {fault}")
            if len(faults) == ENOUGH:
                break
        save_checkpoint(root, 10**7, *_content(10**7))
        left = list(root.glob(".*.part"))
    faults += [f"never swept: {path.name}" for path in left]
    figure = (
        f"{number + 1 - len(faults)} of {number + 1} whole, {newest} times the newest; {inside} killed inside a save"
    )
    return Finding(not faults, figure, tuple(faults))


def _content(step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    numbers = torch.full((NUMBERS,), float(step))
    return {"weights": numbers}, {"step": step, "optimizer": {"one": numbers, "two": numbers}}


def _write(root: Path, said: Path) -> None:
    """Save one step after the other for ever, and say each that is done; one write, so it is said or not."""
    torch.set_num_threads(1)
    step = steps_in(root)[-1]
    with said.open("a", buffering=1) as file:
        while True:
            file.write(f"{step}\n")
            step += 1
            save_checkpoint(root, step, *_content(step))
            prune(root, KEEP, ())


def _look(root: Path, done: int) -> tuple[str | None, int]:
    """(what is wrong, the step that is read): the newest is whole and no older than what was said to be done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = newest_checkpoint(root)
    if found is None:
        return "no checkpoint can be read", -1
    state = found.state(torch.device("cpu"))
    tensors = [*found.weights.values(), *state["optimizer"].values()]
    values = {state["step"], *(float(n) for t in tensors for n in t.aminmax())}
    if values != {found.step}:
        return f"step {found.step} is mixed of {sorted(values)}", found.step
    if not done <= found.step <= done + 1:
        return f"step {found.step} is read, and {done} was done", found.step
    for step in {*steps_in(root)} - {found.step}:
        try:
            load_checkpoint(root / checkpoint.FORM.format(step))
        except FileError as error:
            return f"a broken checkpoint is visible: {error}", found.step
    return None, found.step


def in_place(target: Path, files: Mapping[str, bytes]) -> None:
    """`write_folder` without the hidden folder."""
    make_parents(target)
    disk.make(target)
    for name, data in files.items():
        disk.write(target / name, data)
        disk.sync(target / name)


@contextlib.contextmanager
def _pruned_first() -> Iterator[None]:
    """Saving removes every older checkpoint before it writes."""

    def careless(target: Path, files: Mapping[str, bytes]) -> None:
        for step in steps_in(target.parent):
            discard(target.parent / checkpoint.FORM.format(step))
        write_folder(target, files)

    with swapped(checkpoint, "write_folder", careless):
        yield


ROW = Row(
    10,
    "a kill −9 while a checkpoint is saved loses nothing",
    measure,
    (
        Sabotage("written in its place", lambda: swapped(checkpoint, "write_folder", in_place)),
        Sabotage("older ones are removed first", _pruned_first),
    ),
)
