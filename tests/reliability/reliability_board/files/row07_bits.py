"""Row 7: every flipped bit is found."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rankloom as rl
from rankloom.errors import FileError
from rankloom.files import manifest as manifests
from rankloom.files.manifest import MANIFEST
from rankloom.files.strict import parse
from rankloom.formats import manifest as gate
from rankloom.formats.manifest import CONFIG, WEIGHTS, open_folder
from rankloom.train.checkpoint import load_checkpoint, save_checkpoint
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.files.world import adapted, base, folder, good, silent, write

PER_MB, TRIES = 1e-3, 10
"""Seconds that verifying a megabyte may take, or twice what the digest alone takes on a machine that is slower."""


def measure(budget: Budget) -> Finding:
    """Single flips over config, weights and manifest of an adapter, and over all files of a checkpoint."""
    draw = random.Random(budget.seed)
    flips = budget.of(2000, 300)
    with folder() as root, silent():
        adapter = write(good(), root / "a")
        check = save_checkpoint(root, 1, {"w": torch.randn(300)}, {"n": 1})
        missed = _missed(adapter, (CONFIG, WEIGHTS, MANIFEST), lambda: _tensors(adapter), flips * 3 // 4, draw)
        names = tuple(sorted(p.name for p in check.iterdir()))
        missed += _missed(check, names, lambda: load_checkpoint(check), flips - flips * 3 // 4, draw)
        seconds, digest = _seconds_per_mb(root / "large")
    slow = [f"verifying takes {seconds * 1e3:.1f} ms a megabyte"] if seconds > max(PER_MB, 2 * digest) else []
    figure = f"{flips - len(missed):,} of {flips:,} flips found; {seconds * 1e3:.2f} ms a megabyte"
    return Finding(not missed and not slow, figure, (*missed, *slow))


def _tensors(place: Path) -> None:
    with open_folder(place) as source:
        source.tensors()


def _missed(place: Path, names: tuple[str, ...], read: Callable[[], Any], flips: int, draw: random.Random) -> list[str]:
    whole = {name: (place / name).read_bytes() for name in names}
    read()
    missed = []
    for turn in range(flips):
        name = names[turn % len(names)]
        data = bytearray(whole[name])
        bit = draw.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (place / name).write_bytes(data)
        try:
            read()
            missed.append(f"bit {bit} of {name}")
        except FileError:
            pass
        finally:
            (place / name).write_bytes(whole[name])
    return missed


def _seconds_per_mb(place: Path) -> tuple[float, float]:
    """CPU time of reading and verifying an adapter of some megabytes, and of its digest alone."""
    model = base(hidden_size=512, num_hidden_layers=1)
    rl.save(adapted(model, method=rl.LoRA(r=512)), place)
    raw = (place / WEIGHTS).read_bytes()
    both = _fastest(lambda: _tensors(place)), _fastest(lambda: hashlib.sha256(raw).digest())
    return both[0] / len(raw) * 1e6, both[1] / len(raw) * 1e6


def _fastest(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(TRIES):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def _unsealed(raw: bytes, where: str, *kinds: str) -> Any:
    data = parse(raw, where)
    fields = {"schema", "kind", "versions", "plan", "base", "files", "seal"}
    if set(data) != fields or not manifests._lists_files(data["files"]):
        raise FileError(f"{where}: not a manifest")
    return data


ROW = Row(
    7,
    "every flipped bit is found",
    measure,
    (
        Sabotage("digests of an adapter are not compared", lambda: swapped(gate, "_check_digest", lambda *a: None)),
        Sabotage("the seal of a manifest is not compared", lambda: swapped(gate, "read_manifest", _unsealed)),
    ),
)
