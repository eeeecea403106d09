"""Inputs led by coverage: atheris (libFuzzer) over one parser, in a forked child."""

from __future__ import annotations

import importlib.util
import json
import os
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rankloom.errors import MissingExtra, RankloomError
from reliability_board.child import forked
from reliability_board.files.world import folder

EVERY = 500
"""Inputs between two notes of the count."""


def explore(
    parser: Callable[[bytes], object],
    modules: Sequence[types.ModuleType],
    seeds: Sequence[bytes],
    inputs: int,
    seconds: int,
    seed: int,
) -> tuple[int, list[str]]:
    """(inputs tried, what was raised that is no refusal); the functions of `modules` are instrumented in the child.

    Raises `MissingExtra` without atheris.
    """
    if importlib.util.find_spec("atheris") is None:
        raise MissingExtra("atheris", "reliability", "fuzzing by coverage")
    with folder() as root:
        for number, raw in enumerate(seeds):
            (root / f"seed-{number}").write_bytes(raw)
        options = [f"-runs={inputs}", f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=4096", "-verbosity=0"]
        notes = root.with_name(f"{root.name}.json")
        ended = forked(partial(_child, parser, modules, [*options, str(root)], notes), seconds + 60.0)
        try:
            count, faults = json.loads(notes.read_text())
        except FileNotFoundError:
            count, faults = 0, []
        finally:
            notes.unlink(missing_ok=True)
    return count, [*faults, *([] if ended.died == "exit 0" else [f"the child ended by {ended.died}"])]


def _child(
    parser: Callable[[bytes], object], modules: Sequence[types.ModuleType], options: list[str], notes: Path
) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__:
                setattr(module, name, atheris.instrument_func(value))
    count, faults = 0, []

    def one(raw: bytes) -> None:
        nonlocal count
        count += 1
        try:
            parser(raw)
        except RankloomError:
            pass
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error} on {raw[:80]!r}")
        if count % EVERY == 0 or (faults and len(faults) <= 5):
            notes.write_text(json.dumps([count, faults[:5]]))

    atheris.Setup(["rankloom", *options], one)
    atheris.Fuzz()
