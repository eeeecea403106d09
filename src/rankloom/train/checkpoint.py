"""Checkpoints of a run: immutable version folders `step-00000012`; the newest that verifies wins.

Each holds weights.safetensors, state.safetensors and state.json (optimizer, schedule, scaler, random numbers, data
position, rules' memory, what was folded into the base), sealed by manifest.json. No pickle is written or read. Where
one adapter is active it is an adapter folder too, which `rankloom.load` and PEFT read: adapter_config.json,
adapter_model.safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.journal import Journal
from rankloom.core.state import held
from rankloom.errors import FileError, SettingsError, StateError, suggest
from rankloom.files.folders import discard, read_folder, sweep, write_folder
from rankloom.files.manifest import sealed
from rankloom.files.strict import as_json
from rankloom.formats.manifest import CHECKPOINT as KIND
from rankloom.formats.saving import parcel
from rankloom.train.modes import bank_or_none
from rankloom.train.serialise import pack, unpack

PLACE = "checkpoints"
FORM = "step-{:08d}"
NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: `weights` by key, `state` and `tensors` as `tree.pack` made them."""

    folder: Path
    step: int
    weights: dict[str, Tensor]
    data: Any
    tensors: dict[str, Tensor]

    def state(self, device: torch.device) -> dict[str, Any]:
        """The training state, on `device`."""
        keep_cpu = self.data.get("device") != "cpu"
        return dict(unpack(self.data, self.tensors, device, keep_cpu))


def save_checkpoint(
    root: Path,
    step: int,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    adapter: tuple[Mapping[str, bytes], Mapping[str, Any]] = ({}, {}),
) -> Path:
    """Write one checkpoint below `root`; returns its folder, which changes only as a whole.

    `adapter`: files that make it an adapter folder, and what the manifest says of them.
    """
    tensors: dict[str, Tensor] = {}
    data = pack(dict(state), tensors)
    plain = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in weights.items()}
    files = {
        "weights.safetensors": to_bytes(plain),
        "state.safetensors": to_bytes(tensors),
        "state.json": as_json(data),
        **adapter[0],
    }
    older = [n for n in steps_in(root) if n < step]
    about = {**adapter[1], "kind": KIND, "step": step, "parent": FORM.format(older[-1]) if older else None}
    folder = root / FORM.format(step)
    write_folder(folder, sealed(files, about))
    sweep(root)
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises `FileError` that names what is broken."""
    manifest, files = read_folder(folder, KIND)
    named = NAME.fullmatch(folder.name)
    if type(manifest.get("step")) is not int or (named and int(named[1]) != manifest["step"]):
        raise FileError(f"{folder}: the manifest is of step {manifest.get('step')!r}")
    missing = {"weights.safetensors", "state.safetensors", "state.json"} - files.keys()
    if missing:
        raise FileError(f"{folder}: the manifest lists no {min(missing)!r}")
    try:
        weights, tensors = from_bytes(files["weights.safetensors"]), from_bytes(files["state.safetensors"])
        data = json.loads(files["state.json"])
    except Exception as error:
        raise FileError(f"{folder}: {type(error).__name__}: {error}") from error
    return Checkpoint(folder, manifest["step"], weights, data, tensors)


def newest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest checkpoint below `root` that verifies, or None; newer broken ones are named in a warning.

    One that its run removes while it is read is not broken: there are newer ones then.
    """
    broken: set[int] = set()
    while True:
        steps = [step for step in steps_in(root) if step not in broken]
        if not steps:
            return None
        folder = root / FORM.format(steps[-1])
        try:
            return load_checkpoint(folder)
        except (FileError, OSError) as error:
            if folder.exists():
                broken.add(steps[-1])
                warnings.warn(f"checkpoint {folder.name} is broken and skipped: {error}", stacklevel=2)


def find_checkpoint(resume: bool | str | Path, out: Path | None) -> Checkpoint | None:
    """What to resume from: `True` or `"auto"` the newest of `out` (None: start anew); else a checkpoint's folder, or
    the folder of a run.
    """
    if resume is False:
        return None
    if resume is True or resume == "auto":
        if out is None:
            raise StateError("resume='auto' looks for checkpoints in out=…, which is not given")
        return newest_checkpoint(out / PLACE)
    folder = Path(resume)
    if NAME.fullmatch(folder.name):
        return load_checkpoint(folder)
    for root in (folder / PLACE, folder):
        if steps_in(root):
            found = newest_checkpoint(root)
            if found is not None:
                return found
    raise FileError(f"resume={str(folder)!r}: no checkpoint there; give a folder 'step-…' or the run's own folder")


def steps_in(root: Path) -> list[int]:
    """Steps of the checkpoints below `root`, ascending; nothing is verified."""
    if not root.is_dir():
        return []
    return sorted(int(m[1]) for entry in root.iterdir() if (m := NAME.fullmatch(entry.name)))


def prune(root: Path, keep: int, protect: Collection[int]) -> None:
    """Remove all but the `keep` newest checkpoints and the protected steps."""
    for step in steps_in(root)[:-keep]:
        if step not in protect:
            with contextlib.suppress(OSError):
                discard(root / FORM.format(step))


def as_adapter(model: nn.Module) -> tuple[Mapping[str, bytes], Mapping[str, Any]]:
    """What makes a checkpoint of this model an adapter folder: nothing, unless one adapter alone is active."""
    bank = bank_or_none(model)
    if bank is None or len(bank.active) != 1:
        return {}, {}
    (name,) = bank.active
    try:
        made = parcel(model, name)
    except (SettingsError, StateError) as error:
        warnings.warn(f"checkpoints of this run are no adapter folders: {error}", stacklevel=3)
        return {}, {}
    return made.files, made.manifest


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a run may change: all tensors of the active adapters (frozen factors and buffers too), or without
    a bank the trained parameters and all buffers that a state dict holds.
    """
    bank = bank_or_none(model)
    if bank is None:
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        buffers = {name for name, _ in model.named_buffers()} & model.state_dict().keys()
        return {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if n in names | buffers}
    found: dict[str, Tensor] = {}
    for name in bank.active:
        found |= {f"{name}/{key}": tensor for key, tensor in held(bank, name).items()}
    return found


def folds(model: nn.Module) -> dict[str, Any] | None:
    """What was folded into the base, as state; None without a bank."""
    bank = bank_or_none(model)
    return None if bank is None else bank.journal.state()


def restore_base(model: nn.Module, saved: Mapping[str, Any] | None) -> None:
    """Fold what `folds` gave into the same base. Raises `StateError` where this base has other folds."""
    bank = bank_or_none(model)
    if bank is not None and saved is not None:
        bank.refold(Journal.of(saved))


@torch.no_grad()
def restore_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str = "the checkpoint") -> None:
    """Write saved tensors into the model, whose adapters take their ranks: rules may have changed those on the way.

    Raises `StateError` before anything is changed if keys, dtypes or other sizes differ.
    """
    mine, fitted = model_tensors(model), list(_fitted(model, weights))
    for key in weights.keys() ^ mine.keys():
        owner, other = ("the model", where) if key in mine else (where, "the model")
        pool = weights if key in mine else mine
        raise StateError(f"{owner} has the tensor {key!r}, {other} has not{suggest(key, pool)}; attach the same plan")
    takes = {**mine, **{key: tensor for _, _, trial in fitted for key, tensor in trial.items()}}
    for key, tensor in mine.items():
        if takes[key].shape != weights[key].shape or tensor.dtype != weights[key].dtype:
            raise StateError(
                f"{key!r} is {tuple(weights[key].shape)} {weights[key].dtype} in {where}, "
                f"{tuple(tensor.shape)} {tensor.dtype} in the model; attach the same plan first"
            )
    for adapter, shapes, _ in fitted:
        adapter.fit_to(shapes)
    for key, tensor in model_tensors(model).items():
        tensor.copy_(weights[key])


def _fitted(
    model: nn.Module, weights: Mapping[str, Tensor]
) -> Iterator[tuple[Adapter, dict[str, tuple[int, ...]], dict[str, Tensor]]]:
    """Active adapters that have other shapes than the saved tensors: with these shapes, and the tensors of a copy that
    has taken them as far as it can.
    """
    bank = bank_or_none(model)
    for name in () if bank is None else bank.active:
        assert bank is not None
        for site in bank.sites(name):
            start = f"{name}/{site.name}:"
            said = {k.removeprefix(start): tuple(t.shape) for k, t in weights.items() if k.startswith(start)}
            if any(said.get(k, t.shape) != tuple(t.shape) for k, t in site.adapter.state_dict().items()):
                trial = copy.deepcopy(site.adapter)
                trial.fit_to(said)
                yield site.adapter, said, {start + k: t for k, t in trial.state_dict().items()}
