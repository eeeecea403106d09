"""The gate in front of every adapter folder: what is read is checked before torch sees a byte.

Order: plain files, sizes → strict JSON → numbers within the limits → safetensors header; whoever opens a folder then
checks the exact key set and shapes against the model, and only then the numbers are read: → digests → finite values.
Each file is opened and read once, so what was checked is what is used. Limits are arguments, never switched off by the
environment.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankloom.errors import FileError, StateError
from rankloom.files.manifest import LIMIT, MANIFEST, read_manifest
from rankloom.files.reading import File, Folder, opened
from rankloom.files.strict import parse
from rankloom.formats.header import LENGTH, Header, header_size, read_header, tensors_in
from rankloom.formats.limits import Limits
from rankloom.formats.numbers import check_numbers
from rankloom.ops.linalg import largest, largest_norm

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
KIND, CHECKPOINT = "rankloom-adapter", "rankloom-checkpoint"
"""Kinds of manifest: a checkpoint of a run is an adapter folder with more files in it."""
TRIES = 5
"""How often a folder is opened anew that was replaced while it was read."""
PIECE = 1 << 20
"""Bytes that are read at a time for a digest."""


@dataclass(frozen=True)
class Source:
    """An adapter folder that passed the gate, but for the numbers in its weights file, which is open: `tensors` reads
    them, once.

    `ignore`: unknown config fields that the caller vouches for; `plan`, `base`: the plan and the base's fingerprint as
    data, when the folder has a manifest of ours; `verified`: sizes and digests are those of saving, which `tensors` and
    `verify` ask of the weights; `head`: the bytes before the numbers.
    """

    folder: Path
    config: dict[str, Any]
    header: dict[str, Header]
    manifest: dict[str, Any] | None
    limits: Limits
    ignore: Collection[str]
    file: File
    head: bytes

    @property
    def plan(self) -> dict[str, Any] | None:
        """The plan as data, where there is a manifest."""
        return None if self.manifest is None else self.manifest["plan"]

    @property
    def base(self) -> dict[str, Any] | None:
        """The fingerprint of the base, where a manifest has one."""
        return None if self.manifest is None else self.manifest.get("base")

    @property
    def verified(self) -> bool:
        """Whether there is a manifest to check against."""
        return self.manifest is not None

    @property
    def size(self) -> int:
        """Bytes of the weights file."""
        return self.file.size

    @property
    def config_file(self) -> str:
        """For messages."""
        return str(self.folder / CONFIG)

    @property
    def weights_file(self) -> str:
        """For messages."""
        return str(self.folder / WEIGHTS)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the file, on the CPU. Raises `FileError` for bytes that are not those of saving, and for NaN,
        infinite or huge values, by name.
        """
        raw = bytearray(self.file.size)
        raw[: len(self.head)] = self.head
        self.file.take_into(memoryview(raw)[len(self.head) :])
        self._check_weights(hashlib.sha256(raw) if self.verified else hashlib.sha256())
        found = tensors_in(self.header, torch.frombuffer(raw, dtype=torch.uint8)[len(self.head) :])
        check_values(found, self.weights_file, self.limits)
        return found

    def verify(self) -> None:
        """Read the weights for their digest alone, where there is a manifest. Raises `FileError`."""
        if self.verified:
            found, left = hashlib.sha256(self.head), self.file.size - len(self.head)
            for size in (min(PIECE, left - at) for at in range(0, left, PIECE)):
                found.update(self.file.take(size))
            self._check_weights(found)

    def _check_weights(self, digest: Any) -> None:
        if self.manifest is not None:
            _check_digest(self.folder / WEIGHTS, self.manifest, self.file.size, digest.hexdigest())


def check_values(tensors: Mapping[str, Tensor], where: str, limits: Limits) -> None:
    """Refuse NaN, infinite and huge values, by name."""
    floating = {key: value for key, value in tensors.items() if value.is_floating_point()}
    if largest_norm(floating.values()) <= limits.weight:
        return
    for key, value in floating.items():
        size = largest(value)
        if not size < float("inf"):
            raise FileError(f"{where}: tensor {key!r} has NaN or infinite values")
        if size > limits.weight:
            raise FileError(
                f"{where}: tensor {key!r} has values of size {size:.4g}; at most {limits.weight:g} is read "
                "(limits=Limits(weight=…))"
            )


@contextmanager
def open_folder(folder: str | Path, limits: Limits | None = None, ignore: Collection[str] = ()) -> Iterator[Source]:
    """Check an adapter folder; its weights file is open in the block. Raises `FileError` naming the file and what is
    wrong.
    """
    root = Path(folder)
    with ExitStack() as stack:
        yield _opened(root, limits or Limits(), ignore, stack)


def _opened(root: Path, limits: Limits, ignore: Collection[str], stack: ExitStack) -> Source:
    """The source, of one state of a folder that may be replaced meanwhile; `stack` closes its file."""
    for attempt in range(TRIES):
        _is_adapter_folder(root)
        with opened(root) as found, ExitStack() as trial:
            try:
                source = _read(found, limits, ignore, trial)
            except FileError:
                if not found.replaced() or attempt == TRIES - 1:
                    raise
            else:
                stack.push(trial.pop_all())
                return source
    raise AssertionError


def read_config(folder: str | Path, limits: Limits | None = None) -> dict[str, Any]:
    """adapter_config.json alone. Raises `FileError`."""
    limits = limits or Limits()
    with opened(Path(folder)) as found:
        return parse(found.read(CONFIG, limits.config), str(found.path / CONFIG), limits.depth)


def check_readable(
    files: Mapping[str, bytes], plan: dict[str, Any], tensors: Mapping[str, Tensor], limits: Limits
) -> None:
    """Refuse files with these tensors that `open_folder` would refuse. Raises `StateError`."""
    try:
        if len(files[CONFIG]) > limits.config:
            raise FileError(f"{CONFIG}: {len(files[CONFIG])} bytes; at most {limits.config} are read")
        check_numbers(parse(files[CONFIG], CONFIG, limits.depth), CONFIG, limits)
        check_numbers(plan, MANIFEST, limits)
        raw = files[WEIGHTS]
        if len(raw) > limits.file:
            raise FileError(
                f"{WEIGHTS}: {len(raw)} bytes; at most {limits.file} are read (limits=Limits(file={len(raw)}))"
            )
        start = LENGTH + header_size(raw[:LENGTH], len(raw), WEIGHTS, limits)
        read_header(raw[LENGTH:start], len(raw) - start, WEIGHTS, limits)
        check_values(tensors, WEIGHTS, limits)
    except FileError as error:
        raise StateError(
            f"what was to be saved could not be loaded again, and nothing is written: {error}. Limits given to save "
            "have to be given to load too"
        ) from error


def _read(folder: Folder, limits: Limits, ignore: Collection[str], stack: ExitStack) -> Source:
    config_raw = folder.read(CONFIG, limits.config)
    manifest = _manifest(folder, limits)
    config = parse(config_raw, str(folder.path / CONFIG), limits.depth)
    if not isinstance(config.get("peft_type"), str):
        raise FileError(f"{folder.path / CONFIG}: 'peft_type' is {config.get('peft_type')!r}; it must name the method")
    check_numbers(config, str(folder.path / CONFIG), limits)
    file = stack.enter_context(folder.opened(WEIGHTS))
    if manifest is not None:
        _check_digest(folder.path / CONFIG, manifest, len(config_raw), hashlib.sha256(config_raw).hexdigest())
        _check_digest(folder.path / WEIGHTS, manifest, file.size, None)
    header, head = _weights(file, limits)
    return Source(folder.path, config, header, manifest, limits, ignore, file, head)


def _weights(file: File, limits: Limits) -> tuple[dict[str, Header], bytes]:
    """(the header, checked; the bytes before the numbers); nothing else is read."""
    where = str(file.path)
    if file.size > limits.file:
        raise FileError(f"{where}: {file.size} bytes; at most {limits.file} are read (limits=Limits(file={file.size}))")
    prefix = file.take(min(LENGTH, file.size))
    said = file.take(header_size(prefix, file.size, where, limits))
    return read_header(said, file.size - LENGTH - len(said), where, limits), prefix + said


def _manifest(folder: Folder, limits: Limits) -> dict[str, Any] | None:
    if not folder.has(MANIFEST):
        return None
    where = str(folder.path / MANIFEST)
    data = read_manifest(folder.read(MANIFEST, LIMIT), where, KIND, CHECKPOINT)
    if data is None:
        warnings.warn(f"{where} is not a manifest of ours; the folder is read without it", stacklevel=5)
        return None
    extra = set(data["files"]) - {CONFIG, WEIGHTS}
    if not {CONFIG, WEIGHTS} <= set(data["files"]) or (extra and data["kind"] == KIND):
        raise FileError(f"{where}: 'files' must name {CONFIG} and {WEIGHTS}")
    for field, needed in (("plan", dict), ("base", (dict, type(None)))):
        if not isinstance(data.get(field), needed):
            raise FileError(f"{where}: {field!r} must be an object")
    check_numbers(data["plan"], where, limits)
    return data


def _check_digest(path: Path, manifest: Mapping[str, Any], size: int, digest: str | None) -> None:
    """Refuse a file of another size or digest (None: not known yet) than the manifest says."""
    said = manifest["files"][path.name]
    if said["size"] != size or digest not in (None, said["sha256"]):
        raise FileError(
            f"{path} is not the file that was saved: its size or SHA-256 differs from {MANIFEST}. "
            f"Delete {MANIFEST} to load the folder as it is, unverified"
        )


def _is_adapter_folder(root: Path) -> None:
    if not root.exists():
        raise FileError(
            f"{root}: there is no such folder; a hub repository must be downloaded first (hf download {root})"
        )
    if not root.is_dir():
        raise FileError(f"{root} is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    if not os.path.lexists(root / CONFIG):
        inside = sorted(p.name for p in root.iterdir() if p.is_dir() and (p / CONFIG).exists())
        hint = f"; there is an adapter in {str(root / inside[0])!r}" if inside else ""
        raise FileError(f"{root} has no {CONFIG}, so it is no adapter folder{hint}")
    if not os.path.lexists(root / WEIGHTS):
        raise FileError(f"{root} has no {WEIGHTS}{_instead({p.name for p in root.iterdir()})}")


def _instead(names: set[str]) -> str:
    """What a folder has in the place of the weights file, and what makes it one."""
    if f"{WEIGHTS}.index.json" in names:
        return f": its tensors are split over several files; write them into one {WEIGHTS}"
    if "adapters.safetensors" in names:
        return ": adapters.safetensors is what mlx-lm writes, with names and factors of its own; convert it for PEFT"
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        return f": {pickled[0]} is a pickle, which is never opened here; convert it to safetensors"
    others = sorted(name for name in names if name.endswith(".safetensors"))
    return f"; there is {', '.join(map(repr, others[:3]))}: rename it, if that is the adapter" if others else ""
