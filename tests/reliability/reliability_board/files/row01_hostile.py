"""Row 1: hostile adapter folders are refused clearly or work exactly."""

from __future__ import annotations

import functools
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankloom as rl
from rankloom.errors import FileError
from rankloom.formats import loading, manifest
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.child import forked
from reliability_board.files.cases import Case, curated
from reliability_board.files.mutate import mutated
from reliability_board.files.world import (
    adapted,
    answer,
    bare,
    base,
    digest,
    folder,
    good,
    silent,
    state_digest,
    write,
)

WORK, SECONDS, MEMORY = 2, 40.0, 256 << 20
"""Seconds of work, seconds by the clock, and bytes that a folder may take."""


def measure(budget: Budget) -> Finding:
    """The curated folders in forked children, then random mutations through gate and load."""
    with torch.random.fork_rng([]), silent():
        model = base()
        files, expected = good(), digest(answer(adapted(base())))
        cases = curated(files)
        faults, counts = [], Counter[str]()
        for case in cases[:: budget.of(1, 8)]:
            outcome = _try(model, case)
            counts[outcome["kind"]] += 1
            fault = _fault(case, outcome, expected)
            if fault:
                faults.append(f"{case.name}: {fault}")
        tries = budget.of(10_000, 200)
        faults += _mutations(model, bare(files), tries, budget.seed)
    total = sum(counts.values())
    figure = (
        f"{total} folders: {counts['refused']} refused by name, {counts['loaded']} load unchanged; "
        f"{tries:,} random mutations; {len(faults)} faults"
    )
    return Finding(not faults, figure, tuple(faults))


def _try(model: nn.Module, case: Case) -> dict[str, Any]:
    with folder() as root:
        place = write(case.files, root / "a")
        if case.after is not None:
            case.after(place)
        found = forked(functools.partial(_load, model, place), SECONDS, MEMORY, WORK)
        left = sorted(p.name for p in root.iterdir())
    if found.died:
        return {"kind": "died", "message": found.died.strip().splitlines()[-1]}
    return {**found.value, "left": left}


def _load(model: nn.Module, place: Path) -> dict[str, Any]:
    modules, before = set(sys.modules), state_digest(model)
    try:
        with silent():
            rl.load(model, place)
    except FileError as error:
        found = {"kind": "refused", "message": str(error)}
        return found | {"base": state_digest(model) == before, "modules": sorted(set(sys.modules) - modules)}
    return {"kind": "loaded", "answer": digest(answer(model)), "modules": sorted(set(sys.modules) - modules)}


def _fault(case: Case, found: dict[str, Any], expected: str) -> str | None:
    if found["kind"] == "died":
        return str(found["message"])
    if found["left"] != ["a"]:
        return f"wrote {found['left']}"
    strange = [
        m for m in found["modules"] if m.partition(".")[0] not in ("rankloom", "safetensors", "torch", "difflib")
    ]
    if strange and not all(m.partition(".")[0] in sys.stdlib_module_names for m in strange):
        return f"imported {strange}"
    if found["kind"] == "loaded":
        return _loaded(case, found["answer"] == expected)
    if case.harmless:
        return f"an honest folder is refused: {found['message']}"
    missing = [name for name in case.names if name not in found["message"]]
    if missing:
        return f"the refusal does not name {missing}: {found['message'][:200]}"
    return None if found["base"] else "refused, and the base has changed"


def _loaded(case: Case, same: bool) -> str | None:
    if not same:
        return "loaded with another result"
    return None if case.harmless else "loaded, and nobody said what is wrong with it"


def _mutations(model: nn.Module, plain: dict[str, bytes], tries: int, seed: int) -> list[str]:
    """Random damage without a manifest: a refusal that names a file, or finite numbers on an unchanged base."""
    draw, faults, before = random.Random(seed), [], state_digest(model)
    with folder() as root:
        for turn in range(tries):
            what, files = mutated(plain, draw)
            place = write(files, root / "a")
            try:
                bank = rl.load(model, place, "default")
            except FileError as error:
                if "adapter_" not in str(error):
                    faults.append(f"mutation {turn} ({what}): {error}")
            except Exception as error:
                faults.append(f"mutation {turn} ({what}): {type(error).__name__}: {error}")
            else:
                if not all(bool(t.isfinite().all()) for _, t, _ in bank.tensors("default")):
                    faults.append(f"mutation {turn} ({what}): numbers that are not finite")
            if hasattr(model, "rankloom"):
                rl.detach(model)
    if state_digest(model) != before:
        faults.append("the base has changed")
    return faults


def _itself(source: Any, key: str, expected: Any, model: nn.Module) -> str:
    return key


ROW = Row(
    1,
    "hostile adapter folders are refused clearly or work exactly",
    measure,
    (
        Sabotage("shapes and dtypes are not compared", lambda: swapped(loading, "_fits", lambda *a: None)),
        Sabotage("values are not looked at", lambda: swapped(manifest, "check_values", lambda *a: None)),
        Sabotage("digests are not compared", lambda: swapped(manifest, "_check_digest", lambda *a: None)),
        Sabotage("tensors that nothing asks for are dropped", lambda: swapped(loading, "copied", _itself)),
    ),
)
