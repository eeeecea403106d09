"""Heads that the base's files do not have: they start at random, and an adapter without them is of no use elsewhere."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from rankloom.errors import FileError
from rankloom.files.reading import opened
from rankloom.files.strict import parse
from rankloom.formats.base import base_name
from rankloom.formats.header import LENGTH, header_size
from rankloom.formats.limits import Limits
from rankloom.formats.view import View

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def warn_of_heads(view: View) -> None:
    """Tell of random heads that the adapter leaves behind, by name."""
    kept = {site.path.split(".")[0] for site, _ in view.whole}
    lost = [name for name in random_heads(view.model) if name not in kept]
    if lost:
        warnings.warn(
            f"{', '.join(map(repr, lost))} of this {type(view.model).__name__} is not in the base's files: it started "
            f"at random, and the adapter {view.name!r} does not hold it, so that no other process can use it. Train it "
            f"with the adapter: attach(…, modules_to_save={lost})",
            stacklevel=5,
        )


def random_heads(model: nn.Module) -> list[str]:
    """Children beside the base model none of whose tensors are in the files that the model came from, where these are
    in a folder here; ties to the base model aside.
    """
    inner = getattr(model, "base_model", None)
    name = base_name(model)
    if not isinstance(inner, nn.Module) or inner is model or not name or not os.path.isdir(name):
        return []
    there = set(_written(Path(name)))
    tied = {id(p) for p in inner.parameters()}
    heads = []
    for head, child in model.named_children():
        own = [key for key, p in child.named_parameters() if id(p) not in tied and ".adapters." not in f".{key}"]
        if there and child is not inner and own and not any(_ends(f"{head}.{key}", there) for key in own):
            heads.append(head)
    return heads


def _ends(key: str, there: set[str]) -> bool:
    return any(name == key or name.endswith(f".{key}") for name in there)


def _written(folder: Path) -> Iterator[str]:
    """Names of the tensors in a model's folder; none where they cannot be read."""
    try:
        with opened(folder) as found:
            if found.has(INDEX):
                yield from json.loads(found.read(INDEX, 64 << 20))["weight_map"]
            elif found.has(WHOLE):
                with found.opened(WHOLE) as file:
                    limits = Limits(header=64 << 20)
                    length = header_size(file.take(min(LENGTH, file.size)), file.size, str(file.path), limits)
                    yield from parse(file.take(length), str(file.path)).keys() - {"__metadata__"}
    except (FileError, ValueError, KeyError, TypeError):
        return
