"""Row 11: when the power goes while a checkpoint is saved, one complete checkpoint loads."""

from __future__ import annotations

import hashlib
import random
import shutil
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankloom.errors import FileError
from rankloom.files import disk
from rankloom.files.folders import hidden_beside, make_parents, put
from rankloom.files.manifest import MANIFEST
from rankloom.train import checkpoint
from rankloom.train.checkpoint import FORM, load_checkpoint, newest_checkpoint, prune, save_checkpoint, steps_in
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.training.crash import Disk, logged
from reliability_board.training.world import scratch

KEEP = 2


def measure(budget: Budget) -> Finding:
    """Log some saves, the last one made anew; at each operation make every state that a crash may leave; load what is
    there.
    """
    draw, most = random.Random(budget.seed), budget.of(512, 24)
    with scratch() as folder:
        root = folder / "checkpoints"
        root.mkdir()
        model, done, states, faults, last = Disk(root), 0, 0, [], budget.of(7, 3)
        known: set[str] = set()
        for step in (*range(1, last + 1), last):
            log = logged(partial(_save, root, step))
            saved = next(
                i
                for i, op in enumerate(log)
                if op.kind == "remove" and op.path.name.startswith(f".{FORM.format(step)}")
            )
            for number, operation in enumerate(log):
                model.do(operation)
                done = step if number >= saved else max(done, step - 1)
                for state in model.states(most, draw):
                    seen = _digest(state, done)
                    if seen in known:
                        continue
                    known.add(seen)
                    states += 1
                    fault = _look(folder / "after", root, state, done)
                    if fault is not None:
                        faults.append(f"save {step}, after {operation.kind} {operation.path.name}: {fault}")
    figure = f"{states - len(faults)} of {states} states load the last checkpoint that was done, or the one being saved"
    return Finding(not faults, figure, tuple(faults))


def _save(root: Path, step: int) -> None:
    numbers = torch.full((64,), float(step))
    save_checkpoint(root, step, {"weights": numbers}, {"step": step, "optimizer": numbers})
    prune(root, KEEP, ())


def _digest(state: Mapping[Path, bytes | None], done: int) -> str:
    found = hashlib.sha256(f"{done}".encode())
    for path, data in sorted(state.items()):
        found.update(f"\n{path} {'folder' if data is None else hashlib.sha256(data).hexdigest()}".encode())
    return found.hexdigest()


def _look(place: Path, root: Path, state: Mapping[Path, bytes | None], done: int) -> str | None:
    """Lay the state out and read it: what is wrong."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path, data in state.items():
        here = place / path.relative_to(root)
        if data is None:
            here.mkdir()
        else:
            here.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = newest_checkpoint(place)
    if found is None:
        return None if done == 0 else f"no checkpoint loads, and step {done} was done"
    if found.data["step"] != found.step or float(found.weights["weights"][0]) != found.step:
        return f"step {found.step} is mixed"
    if found.step < done:
        return f"step {found.step} loads, and step {done} was done"
    for step in {*steps_in(place)} - {found.step}:
        try:
            load_checkpoint(place / FORM.format(step))
        except FileError as error:
            return f"a broken checkpoint is visible: {error}"
    return None


def _renamed_early(target: Path, files: Mapping[str, bytes]) -> None:
    """`write_folder` with the manifest after it is in its place."""
    make_parents(target)
    hidden = hidden_beside(target)
    disk.make(hidden)
    for name, data in files.items():
        if name != MANIFEST:
            disk.write(hidden / name, data)
            disk.sync(hidden / name)
    put(hidden, target)
    disk.write(target / MANIFEST, files[MANIFEST])
    disk.sync(target / MANIFEST)
    disk.sync(target)
    disk.remove(hidden)


def _nothing(*args: Any) -> None:
    return None


ROW = Row(
    11,
    "when the power goes while a checkpoint is saved, a complete one loads",
    measure,
    (
        Sabotage("nothing is synced", lambda: swapped(disk, "sync", _nothing)),
        Sabotage("renamed before the manifest", lambda: swapped(checkpoint, "write_folder", _renamed_early)),
    ),
)
