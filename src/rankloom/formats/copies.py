"""Tensors of a PEFT file that its adapter does not ask for: copies of others, and whole modules of another base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from rankloom.core.targets import base_modules
from rankloom.errors import FileError, suggest
from rankloom.formats.manifest import Source
from rankloom.formats.peft.paths import WRAPPED, strip

FullTensors = Literal["compare", "take"]
Copies = Mapping[str, str | Tensor]
"""Key in the file → what it copies: another key of the file, or a tensor of the base."""


def copied(source: Source, key: str, expected: Mapping[str, Tensor], model: nn.Module) -> str | Tensor:
    """What a tensor that nothing asks for is a copy of. Raises `FileError` where it belongs to nothing."""
    twin = key.replace(".modules_to_save.", ".")
    if twin != key and twin in expected:
        return twin
    modules = dict(base_modules(model))
    owner, _, leaf = _name(key, modules).rpartition(".")
    module = modules.get(owner)
    both = {} if module is None else {**module._parameters, **module._buffers}
    base = both.get(leaf)
    if base is None:
        raise FileError(
            f"{source.weights_file}: tensor {key!r} of shape {source.header[key].shape} belongs to nothing that the "
            f"config adapts{suggest(key, expected, n=1)}"
        )
    return base


def check_copies(source: Source, copies: Copies, tensors: Mapping[str, Tensor]) -> None:
    """A copy (PEFT writes some) must equal what it copies: it is never written."""
    for key, of in copies.items():
        if _equal(tensors[key], tensors[of] if isinstance(of, str) else of):
            continue
        if isinstance(of, str):
            raise FileError(f"{source.weights_file}: tensor {key!r} differs from {of!r}, which it should copy")
        raise FileError(
            f"{source.weights_file}: tensor {key!r} holds a base weight{_where(tensors[key], of)} that is another in "
            f"this model, and nothing trains it: {_remedy(key)}"
        )


def with_full(source: Source, copies: Copies, tensors: Mapping[str, Tensor], model: nn.Module) -> Source:
    """The folder as if the modules whose full tensors differ from the base's were among its modules_to_save."""
    other = {key for key, of in copies.items() if isinstance(of, Tensor) and not _equal(tensors[key], of)}
    wrapped = sorted(key for key in other if f".{WRAPPED}." in key)
    if wrapped:
        raise FileError(f"{source.weights_file}: tensor {wrapped[0]!r} is adapted too: {_remedy(wrapped[0])}")
    modules = dict(base_modules(model))
    names = {_name(key, modules).rpartition(".")[0] for key in other}
    for name in sorted(names):
        _check_ties(source, name, names, modules)
    saved = [*(source.config.get("modules_to_save") or ()), *sorted(names)]
    return dataclasses.replace(source, config={**source.config, "modules_to_save": saved}) if names else source


def _check_ties(source: Source, name: str, names: set[str], modules: Mapping[str, nn.Module]) -> None:
    """Refuse to take a module whose weight is also that of another one, which the file does not have."""
    own = {id(p) for p in modules[name]._parameters.values() if p is not None}
    for other, module in modules.items():
        if other not in names and any(id(p) in own for p in module._parameters.values()):
            raise FileError(
                f"{source.weights_file}: has a tensor of {name!r}, which is tied to {other!r} in this model, and none "
                f"for that: copy it into the model before loading, {name}.weight.data.copy_(…)"
            )


def _name(key: str, modules: Mapping[str, nn.Module]) -> str:
    return strip(key, modules).replace(".original_module.", ".")


def _equal(tensor: Tensor, of: Tensor) -> bool:
    here = of.detach().cpu()
    return torch.equal(tensor.to(here.dtype), here) or torch.equal(here.to(tensor.dtype), tensor)


def _where(tensor: Tensor, base: Tensor) -> str:
    """The rows that differ, where these are some."""
    if tensor.ndim != 2:
        return ""
    rows = (tensor != base.detach().cpu().to(tensor.dtype)).any(1).nonzero().flatten().tolist()
    return f" (rows {rows[0]} to {rows[-1]} of {len(tensor)})" if rows and len(rows) < len(tensor) else ""


def _remedy(key: str) -> str:
    name = strip(key, ()).rpartition(".")[0]
    if f".{WRAPPED}." in key:
        return (
            f"load the base that the adapter was trained on, or copy the tensor into it before loading, "
            f"model.{name}.weight.data.copy_(…)"
        )
    return (
        "the adapter was trained on another base, or the rows that a larger vocabulary added were drawn anew; "
        "load(…, full_tensors='take') takes it as a module trained whole"
    )
