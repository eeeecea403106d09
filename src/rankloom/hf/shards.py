"""A model as files: its weights one layer at a time, so that an adapter is merged without ever loading the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.bank import Bank
from rankloom.core.merging import edited, edits, kind_at
from rankloom.core.site import Site
from rankloom.core.slots import present
from rankloom.core.targets import base_modules
from rankloom.errors import FileError
from rankloom.hf.folder import INDEX, weight_files
from rankloom.hf.packed import GLOB
from rankloom.store.base import Packed, dense
from rankloom.store.files import from_files, metadata_of, packed_keys

LARGEST = 5 * 10**9
"""Bytes of a file after which the next one begins."""


class Shards:
    """The weight files of a folder; `names`: its tensors, packed ones by the name of the weight. Reads when asked."""

    def __init__(self, folder: Path) -> None:
        files = [_opened(path) for path in sorted(folder.glob(GLOB)) or _plain_files(folder)]
        self._file = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        self._about: dict[str, str] = {k: v for file in files for k, v in (file.metadata() or {}).items()}
        self._parts = packed_keys(self._about)
        parts = {key for keys in self._parts.values() for key in keys}
        self.names = (*(key for key in self._file if key not in parts), *self._parts)

    def tensor(self, name: str) -> Tensor:
        """One tensor, as it is kept."""
        if name not in self._parts:
            found: Tensor = self._file[name].get_tensor(name)
            return found
        parts = {key: self._file[key].get_tensor(key) for key in self._parts[name]}
        return from_files(parts, metadata_of(name, self._about))[name]


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise FileError(f"{path}: {error}; the file is damaged or not all there: download it again") from error


def has_shards(folder: Path) -> bool:
    """Whether a folder has weight files that can be read tensor by tensor."""
    return any(folder.glob(GLOB)) or bool(_plain_files(folder))


def _plain_files(folder: Path) -> list[Path]:
    names = weight_files(folder) or ["model.safetensors"]
    return [folder / name for name in names if (folder / name).is_file()]


class FromFile:
    """The weights of one layer, in memory only between `pre_forward` and `post_forward`: what accelerate's hooks do."""

    offload = True
    execution_device = torch.device("cpu")

    def __init__(self, shards: Shards, path: str, dtype: torch.dtype | None) -> None:
        self.shards, self.path, self.dtype = shards, path, dtype
        self._away: dict[str, nn.Parameter | None] = {}

    def pre_forward(self, layer: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self._away = dict(layer._parameters)
        for key, away in self._away.items():
            if away is not None:
                tensor = self.shards.tensor(f"{self.path}.{key}" if self.path else key)
                layer._parameters[key] = nn.Parameter(tensor if self.dtype is None else tensor.to(self.dtype), False)
        return args, kwargs

    def post_forward(self, layer: nn.Module, output: Any) -> Any:
        layer._parameters.update(self._away)
        return output


def hang(model: nn.Module, shards: Shards, dtype: torch.dtype | None) -> list[str]:
    """Let every layer of a model without weights find its own in the files; the names that are in no file."""
    missing = []
    for path, module in base_modules(model):
        names = [f"{path}.{key}" if path else key for key, value in module._parameters.items() if value is not None]
        absent = [name for name in names if name not in shards.names]
        missing += absent
        if names and not absent:
            module.__dict__["_hf_hook"] = FromFile(shards, path, dtype)
    return missing


@torch.no_grad()
def merged(bank: Bank, name: str, shards: Shards, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, dense, with the changes of the adapter `name` added, one layer after the other."""
    layers: dict[str, list[tuple[Site, float]]] = {}
    for site in bank.sites(name):
        layers.setdefault(site.path, []).append((site, 1.0))
    done: set[str] = set()
    for path, parts in layers.items():
        layer = parts[0][0].layer
        with present(layer):
            values: dict[str, Tensor] = {}
            for edit in edits(parts, "dense"):
                key = kind_at(layer, edit.slot).parameter()
                values[key] = edited(layer, edit, values.get(key))
        done |= {f"{path}.{key}" for key in values}
        yield from ((f"{path}.{key}", value) for key, value in values.items())
    for key in shards.names:
        if key not in done:
            tensor = shards.tensor(key)
            plain = dense(tensor) if isinstance(tensor, Packed) else tensor
            yield key, plain.to(dtype) if dtype is not None and plain.is_floating_point() else plain


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], largest: int = LARGEST) -> None:
    """Write tensors as they come, a new file after `largest` bytes, with an index where there are several."""
    from safetensors.torch import save_file

    where: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(batch, folder / f"{len(where)}.part", metadata={"format": "pt"})
        where.append(list(batch))
        batch.clear()

    for key, tensor in tensors:
        batch[key] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= largest:
            flush()
            size = 0
    if batch or not where:
        flush()
    _name(folder, where, total)


def _name(folder: Path, where: list[list[str]], total: int) -> None:
    if len(where) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05}-of-{len(where):05}.safetensors" for i in range(len(where))]
    for i, name in enumerate(names):
        (folder / f"{i}.part").rename(folder / name)
    weights: Mapping[str, str] = {key: name for name, keys in zip(names, where) for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
