"""The gate in front of every adapter folder: what is read is checked before torch sees a byte.

Order: regular file, size → strict JSON → safetensors header → digests → finite values. Whoever calls it then checks the
exact key set and shapes against the model. Limits are arguments, never switched off by the environment.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankloom.errors import FileError
from rankloom.files.manifest import MANIFEST, read_manifest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
KIND = "rankloom-adapter"
DTYPES = {
    "BOOL": (torch.bool, 1),
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "F32": (torch.float32, 4),
    "F64": (torch.float64, 8),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
    "I32": (torch.int32, 4),
    "I64": (torch.int64, 8),
    "U8": (torch.uint8, 1),
}


@dataclass(frozen=True)
class Limits:
    """Largest config and header in bytes, deepest nesting, most tensors, highest rank."""

    config: int = 1 << 20
    header: int = 8 << 20
    depth: int = 12
    tensors: int = 50_000
    rank: int = 4096


@dataclass(frozen=True)
class Header:
    """What the weights file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """An adapter folder that passed the gate; its tensors are read by `tensors`.

    `plan`: the plan as data, when the folder has a manifest of ours; `verified`: sizes and digests are those of saving.
    """

    folder: Path
    config: dict[str, Any]
    header: dict[str, Header]
    plan: dict[str, Any] | None
    verified: bool
    limits: Limits

    @property
    def config_file(self) -> str:
        """For messages."""
        return str(self.folder / CONFIG)

    @property
    def weights_file(self) -> str:
        """For messages."""
        return str(self.folder / WEIGHTS)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the weights file, on the CPU. Raises `FileError` for NaN or infinite values, by name."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.folder / WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise FileError(f"{self.weights_file}: {error}") from error
        for key, value in tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
                raise FileError(f"{self.weights_file}: tensor {key!r} has NaN or infinite values")
        return tensors


def open_folder(folder: str | Path, limits: Limits | None = None) -> Source:
    """Read config, header and manifest of an adapter folder. Raises `FileError` naming the file and what is wrong."""
    limits = limits or Limits()
    root = Path(folder)
    _is_adapter_folder(root)
    config = read_json(_regular(root, CONFIG), limits)
    if not isinstance(config.get("peft_type"), str):
        raise FileError(f"{root / CONFIG}: 'peft_type' is {config.get('peft_type')!r}; it must name the method")
    _check_ranks(config, str(root / CONFIG), limits)
    header = read_header(_regular(root, WEIGHTS), limits)
    manifest = _read_manifest(root, limits)
    plan = manifest.get("plan") if manifest else None
    return Source(root, config, header, plan, manifest is not None, limits)


def read_json(path: Path, limits: Limits) -> dict[str, Any]:
    """A JSON object: size and depth limited, no duplicate keys, no NaN or Infinity."""
    if path.stat().st_size > limits.config:
        raise FileError(f"{path}: {path.stat().st_size} bytes; a config has at most {limits.config}")
    return _parse(path.read_bytes(), str(path), limits.depth)


def read_header(path: Path, limits: Limits) -> dict[str, Header]:
    """The header of a safetensors file, checked against the file's size without reading the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > limits.header or 8 + length > size:
            raise FileError(f"{path}: no safetensors file: its header says {length} bytes, the file has {size}")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise FileError(f"{path}: no safetensors file: the header must start with '{{'")
    data = _parse(raw, str(path), limits.depth)
    data.pop("__metadata__", None)
    if len(data) > limits.tensors:
        raise FileError(f"{path}: {len(data)} tensors; at most {limits.tensors}")
    found, spans = {}, []
    for key, entry in data.items():
        found[key], span = _entry(str(path), key, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise FileError(f"{path}: the tensors' data overlap or leave a gap at byte {end}")
        end = stop
    if end != size - 8 - length:
        raise FileError(f"{path}: the header names {end} bytes of data, the file has {size - 8 - length}")
    return found


def _is_adapter_folder(root: Path) -> None:
    if not root.exists():
        raise FileError(
            f"{root}: there is no such folder; a hub repository must be downloaded first (hf download {root})"
        )
    if not root.is_dir():
        raise FileError(f"{root} is a file; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    if not (root / CONFIG).exists():
        inside = sorted(p.name for p in root.iterdir() if p.is_dir() and (p / CONFIG).exists())
        hint = f"; there is an adapter in {str(root / inside[0])!r}" if inside else ""
        raise FileError(f"{root} has no {CONFIG}, so it is no adapter folder{hint}")
    if not (root / WEIGHTS).exists():
        pickled = next((p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth")), None)
        hint = f": {pickled} is a pickle, which is never opened here; convert it to safetensors" if pickled else ""
        raise FileError(f"{root} has no {WEIGHTS}{hint}")


def _regular(root: Path, name: str) -> Path:
    path = root / name
    if path.is_symlink():
        real, home = path.resolve(), root.resolve()
        if not real.is_relative_to(home) and not real.is_relative_to(home.parent.parent / "blobs"):
            raise FileError(f"{path} is a link that leaves the folder (to {real}); copy the file instead")
    if not stat.S_ISREG(path.stat().st_mode):
        raise FileError(f"{path} is no regular file")
    return path


def _parse(raw: bytes, where: str, depth: int) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [k for k, _ in items]
            raise FileError(f"{where}: the key {next(k for k in names if names.count(k) > 1)!r} is there twice")
        return found

    def constant(literal: str) -> Any:
        raise FileError(f"{where}: {literal} is no JSON number")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else constant(text)

    try:
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant, parse_float=number)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{where}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise FileError(f"{where}: expected a JSON object, got a {type(data).__name__}")
    if _depth(data, depth) > depth:
        raise FileError(f"{where}: nested deeper than {depth} levels")
    return data


def _depth(data: Any, left: int) -> int:
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    if left < 0:
        return 1
    return 1 + max((_depth(v, left - 1) for v in inner if isinstance(v, (dict, list))), default=0)


def _entry(where: str, key: str, entry: Any) -> tuple[Header, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{where}: the header of tensor {key!r} is not dtype, shape and data_offsets")
    if entry["dtype"] not in DTYPES:
        raise FileError(f"{where}: tensor {key!r} has dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}")
    dtype, size = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise FileError(f"{where}: tensor {key!r} has shape {shape!r} and offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * size:
        raise FileError(f"{where}: tensor {key!r} of shape {shape} takes {offsets[1] - offsets[0]} bytes")
    return Header(dtype, tuple(shape)), (offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_ranks(data: Any, where: str, limits: Limits, field: str = "") -> None:
    if isinstance(data, dict):
        for key, value in data.items():
            named = key in ("r", "init_r", "target_r") or field == "rank_pattern"
            if named and type(value) is int and not 0 < value <= limits.rank:
                raise FileError(f"{where}: {key}={value}: a rank is from 1 to {limits.rank}")
            _check_ranks(value, where, limits, key)
    elif isinstance(data, list) and field != "rank_pattern":
        for value in data:
            _check_ranks(value, where, limits)


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_manifest(root: Path, limits: Limits) -> dict[str, Any] | None:
    if not (root / MANIFEST).exists():
        return None
    path = _regular(root, MANIFEST)
    data = read_manifest(path.read_bytes(), str(path), KIND)
    if data is None:
        warnings.warn(f"{path} is not a manifest of ours; the folder is read without it", stacklevel=4)
        return None
    files = data["files"]
    if set(files) != {CONFIG, WEIGHTS}:
        raise FileError(f"{path}: 'files' must name {CONFIG} and {WEIGHTS}")
    for name, said in files.items():
        if said != _digest(root / name):
            raise FileError(
                f"{root / name} is not the file that was saved: its size or SHA-256 differs from {MANIFEST}. "
                f"Delete {MANIFEST} to load the folder as it is, unverified"
            )
    if not isinstance(data.get("plan"), dict):
        raise FileError(f"{path}: 'plan' must be an object")
    _check_ranks(data["plan"], str(path), limits)
    return data
