"""Row 16: readers never see half a checkpoint or adapter, modes follow the umask, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import stat
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from rankloom.errors import FileError
from rankloom.files import disk
from rankloom.files.manifest import sealed
from rankloom.formats import folder as placing
from rankloom.formats.manifest import CARD, CONFIG, KIND, WEIGHTS, open_folder
from rankloom.train import checkpoint
from rankloom.train.checkpoint import newest_checkpoint, prune, save_checkpoint
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.training.process import Process, start
from reliability_board.training.row10_kill_while_saving import in_place
from reliability_board.training.world import scratch

NUMBERS, READERS = 1 << 14, 4
UMASKS = (0o022, 0o027, 0o077, 0o002)


def measure(budget: Budget) -> Finding:
    """A writer that replaces an adapter and adds checkpoints; readers of both; then modes under four umasks."""
    with scratch() as folder:
        faults = _together(folder, budget.of(30, 2))
        reads = sum(int((folder / f"reads {i}").read_text()) for i in range(READERS))
        faults += [fault for umask in UMASKS for fault in _modes(folder, umask)]
        faults += [f"left behind: {path.name}" for path in folder.rglob(".*.part")]
    figure = f"{reads} reads by {READERS} readers, {len(faults)} faults; modes right under {len(UMASKS)} umasks"
    return Finding(not faults and reads > 0, figure, tuple(faults))


def write(folder: Path, step: int) -> None:
    """The next version of the adapter, and the next checkpoint."""
    from safetensors.torch import save

    numbers = torch.full((NUMBERS,), float(step))
    config = f'{{"peft_type": "LORA", "r": {step}}}'.encode()
    files = {CONFIG: config, WEIGHTS: save({"a": numbers})}
    placing.place(folder / "adapter", {**sealed(files, {"kind": KIND, "plan": {}, "base": None}), CARD: b""})
    save_checkpoint(folder / "checkpoints", step, {"a": numbers}, {"step": step})
    prune(folder / "checkpoints", 2, ())


def _together(folder: Path, seconds: float) -> list[str]:
    write(folder, 1)
    stop = folder / "stop"
    jobs = [start(lambda: _writing(folder, stop))]
    jobs += [start(partial(_reading, folder, stop, i)) for i in range(READERS)]
    time.sleep(seconds)
    stop.touch()
    faults = [f"job {i} ended with {code}" for i, code in enumerate(map(_end, jobs)) if code != 0]
    return faults + [line for path in sorted(folder.glob("faults *")) for line in path.read_text().splitlines()[:5]]


def _end(process: Process) -> int | None:
    return process.end(30)


def _writing(folder: Path, stop: Path) -> None:
    step = 1
    while not stop.exists() and step < 4000:
        step += 1
        write(folder, step)


def _reading(folder: Path, stop: Path, number: int) -> None:
    """Read until told to stop; what is read is one version, whole and no older than the one before."""
    reads, last, faults = 0, [0, 0], []
    while not stop.exists():
        for i, read in enumerate((_adapter, _checkpoint)):
            step, fault = read(folder)
            reads += 1
            if fault is None and step < last[i]:
                fault = f"step {step} after step {last[i]}"
            last[i] = max(last[i], step)
            faults += [] if fault is None else [fault]
    (folder / f"faults {number}").write_text("\n".join(faults))
    (folder / f"reads {number}").write_text(str(reads))


def _adapter(folder: Path) -> tuple[int, str | None]:
    try:
        with open_folder(folder / "adapter") as source:
            low, high = (float(n) for n in source.tensors()["a"].aminmax())
    except (FileError, OSError) as error:
        return 0, f"the adapter cannot be read: {error}"
    step = int(source.config["r"])
    return step, None if low == high == step else f"an adapter of step {step} with weights {low} … {high}"


def _checkpoint(folder: Path) -> tuple[int, str | None]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = newest_checkpoint(folder / "checkpoints")
    if found is None or told:
        return 0, f"a reader of checkpoints was told: {[str(w.message) for w in told]}"
    low, high = (float(n) for n in found.weights["a"].aminmax())
    return found.step, None if low == high == found.step else f"checkpoint {found.step} has {low} … {high}"


def _modes(folder: Path, umask: int) -> Iterator[str]:
    place, before = folder / f"umask {umask:o}", os.umask(umask)
    try:
        place.mkdir()
        write(place, 1)
        write(place, 2)
    finally:
        os.umask(before)
    for path in place.rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != wanted:
            yield f"umask {umask:03o}: {path.relative_to(place)} has mode {mode:03o}, not {wanted:03o}"


@contextlib.contextmanager
def _both_in_place() -> Iterator[None]:
    """Adapters and checkpoints are written where they are read."""

    def over(target: Path, files: dict[str, bytes], beside: object = ()) -> None:
        target.mkdir(exist_ok=True)
        for name, data in files.items():
            (target / name).write_bytes(data)

    with swapped(placing, "write_folder", over), swapped(checkpoint, "write_folder", in_place):
        yield


@contextlib.contextmanager
def _private() -> Iterator[None]:
    """Files get mode 0600 whatever the umask, as temporary files do."""
    put = disk._put

    def closed(path: Path, mode: str, data: bytes) -> None:
        put(path, mode, data)
        path.chmod(0o600)

    with swapped(disk, "_put", closed):
        yield


ROW = Row(
    16,
    "readers never see half a checkpoint or adapter, and modes follow the umask",
    measure,
    (Sabotage("written in its place", _both_in_place), Sabotage("mode 0600", _private)),
)
