"""Row 14: a run that was killed and taken up is bit for bit the run that was not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankloom.reliability.board import Budget, Finding, Row, Sabotage, swapped
from rankloom.reliability.child import forked
from rankloom.reliability.training.world import World, ended, scratch, warm, worlds
from rankloom.train import loop, stream

SECONDS = 120.0


def measure(budget: Budget) -> Finding:
    """Each world in one go, and killed at random instants and taken up, in processes of their own."""
    draw, kills = random.Random(budget.seed), budget.of(20, 1)
    runs = inside = equal = 0
    faults = []
    every = list(worlds())
    warm(every[0])
    for world in every:
        with scratch() as folder:
            for same, in_save, words in _broken(world, folder, kills, draw):
                runs, equal, inside = runs + 1, equal + same, inside + in_save
                if not same:
                    faults.append(f"{world.name}: {words}")
    figure = f"{equal} of {runs} equal bit for bit over {runs // kills} kinds of run; {inside} killed inside a save"
    return Finding(equal == runs, figure, tuple(faults))


def _broken(world: World, folder: Path, kills: int, draw: random.Random) -> Iterator[tuple[bool, bool, str]]:
    """(whether it ended the same, whether a save was cut off, what happened) of every kill."""
    straight = forked(lambda: ended(world, folder / "straight"), SECONDS)
    for number in range(kills):
        if straight.died is not None:
            yield False, False, f"the run that nobody killed: {straight.died}"
            continue
        out, instant = folder / str(number), draw.uniform(0.2, 1.0) * straight.seconds
        forked(lambda out=out: ended(world, out), instant)
        half = any(out.rglob(".*.part"))
        again = forked(lambda out=out: ended(world, out), SECONDS)
        left = f"; left behind: {sorted(p.name for p in out.rglob('.*.part'))}" if any(out.rglob(".*.part")) else ""
        how = again.died or ("equal" if again.value == straight.value else "another ending")
        yield how == "equal" and not left, half, f"killed after {instant:.3f} s: {how}{left}"


def _nothing(*args: Any) -> None:
    return None


ROW = Row(
    14,
    "a run that was killed and taken up is bit for bit the run that was not",
    measure,
    (
        Sabotage("the random state is not restored", lambda: swapped(loop, "set_rng_state", _nothing)),
        Sabotage("the place in the data is not restored", lambda: swapped(stream._Ordered, "restore", _nothing)),
    ),
)
