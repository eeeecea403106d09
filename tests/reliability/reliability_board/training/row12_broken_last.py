"""Row 12: a broken last checkpoint is named and skipped, and the run goes on from the one before."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rankloom.files.manifest import MANIFEST
from rankloom.train import checkpoint
from rankloom.train.checkpoint import FORM, PLACE, load_checkpoint, steps_in
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.child import forked
from reliability_board.training.world import World, ended, ending, plan_of, scratch

DAMAGES: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "absent": lambda data, other: None,
    "empty": lambda data, other: b"",
    "truncated": lambda data, other: data[:-1],
    "flipped": lambda data, other: bytes([*data[:-9], data[-9] ^ 4, *data[-8:]]),
    "foreign": lambda data, other: other,
}
"""What becomes of a file's bytes; `other`: those of another checkpoint, one byte longer."""
LIMIT = 120.0


def measure(budget: Budget) -> Finding:
    """Each file of the newest damaged in each way; then a run that is killed, taken up and killed again."""
    world, faults = World("lora", {"default": plan_of("lora")}), []
    with scratch() as folder:
        whole = ended(world, folder / "whole")
        cases = [(p.name, damage) for p in sorted(_newest(folder / "whole").iterdir()) for damage in DAMAGES]
        for name, damage in cases:
            fault = _damaged(world, folder, name, damage, whole)
            if fault is not None:
                faults.append(f"{name} {damage}: {fault}")
        kills = budget.of(60, 6)
        lost = _killed_again_and_again(world, folder / "killed", kills, whole, random.Random(budget.seed))
    skipped = len(cases) - len(faults)
    figure = f"{skipped} of {len(cases)} damages skipped by name; {kills} kills one after the other: {lost or 'equal'}"
    return Finding(not faults and lost is None, figure, (*faults, *filter(None, [lost])))


def _newest(out: Path) -> Path:
    return out / PLACE / FORM.format(steps_in(out / PLACE)[-1])


def _damaged(world: World, folder: Path, name: str, damage: str, whole: str) -> str | None:
    out = folder / "damaged"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder / "whole", out)
    newest = _newest(out)
    before = newest.parent / FORM.format(steps_in(newest.parent)[-2])
    data = DAMAGES[damage]((newest / name).read_bytes(), (before / name).read_bytes() + b"\n")
    (newest / name).unlink()
    if data is not None:
        (newest / name).write_bytes(data)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            world.run(out)
        except Exception as error:
            return f"the run does not start: {type(error).__name__}: {error}"
    words = [str(w.message) for w in told]
    if not any(f"{newest.name} is broken and skipped" in w and name in w for w in words):
        return f"nobody said that {newest.name} is skipped, and why: {words}"
    return None if ending(out) == whole else "another ending"


def _killed_again_and_again(world: World, folder: Path, kills: int, whole: str, draw: random.Random) -> str | None:
    """Kill a run, take it up, kill it again; what ended before its kill is compared, and a new run begun."""
    done = number = 0
    while True:
        seconds = draw.uniform(0.02, 0.2) if done < kills else LIMIT
        end = forked(partial(ended, world, folder / str(number)), seconds)
        if end.died == "hang" and done < kills:
            done += 1
        elif end.died is not None:
            return f"taken up after {done} kills: {end.died}"
        elif end.value != whole:
            return f"run {number} ended otherwise after {done} kills"
        elif done == kills:
            return None
        else:
            number += 1


def _highest(root: Path) -> checkpoint.Checkpoint | None:
    """`newest_checkpoint` that does not look inside before it chooses."""
    steps = steps_in(root)
    return load_checkpoint(root / FORM.format(steps[-1])) if steps else None


def _unverified(folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """`read_folder` that believes what it reads."""
    names = [p.name for p in folder.iterdir() if p.name != MANIFEST]
    return json.loads((folder / MANIFEST).read_bytes()), {name: (folder / name).read_bytes() for name in names}


ROW = Row(
    12,
    "a broken last checkpoint is named and skipped",
    measure,
    (
        Sabotage("the highest number is taken", lambda: swapped(checkpoint, "newest_checkpoint", _highest)),
        Sabotage("digests are not compared", lambda: swapped(checkpoint, "read_folder", _unverified)),
    ),
)
