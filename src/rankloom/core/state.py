"""An adapter as tensors in memory, by keys of the bank: "site:path" for what a site owns, "shared:key" for the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rankloom.core.adapter import Adapter
from rankloom.core.shared import Shared
from rankloom.core.site import Site
from rankloom.errors import StateError, suggest


class Holder(Protocol):
    """Who has adapters: the bank."""

    def sites(self, name: str) -> list[Site]: ...

    def shared_of(self, name: str) -> Shared: ...


def held(bank: Holder, name: str) -> dict[str, Tensor]:
    """Every tensor of the adapter `name`, itself and not a copy: frozen factors and kept buffers too."""
    found: dict[str, Tensor] = {}
    for site in bank.sites(name):
        found |= {f"{site.name}:{k}": t for k, t in site.adapter.state_dict(keep_vars=True).items()}
    shared = bank.shared_of(name).state_dict(keep_vars=True)
    return {**found, **{f"shared:{key}": tensor for key, tensor in shared.items()}}


@torch.no_grad()
def put(bank: Holder, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` into the adapter. Raises `StateError` before anything is written for a key that is missing or
    unknown, and for a shape or kind of number that the adapter cannot take.
    """
    mine = held(bank, name)
    for key in mine.keys() - tensors.keys():
        raise StateError(f"load_state: no tensor {key!r} for the adapter {name!r}{suggest(key, tensors)}")
    for key in tensors.keys() - mine.keys():
        raise StateError(f"load_state: the adapter {name!r} has no tensor {key!r}{suggest(key, mine)}")
    others = list(_of_other_shapes(bank, name, tensors))
    fitted = {site.name: _fitted(site.adapter, shapes) for site, shapes in others}
    expected = {**mine, **{f"{at}:{k}": t for at, trial in fitted.items() for k, t in trial.state_dict().items()}}
    for key, tensor in expected.items():
        _check(name, key, tensors[key], tensor)
    for site, shapes in others:
        site.adapter.fit_to(shapes)
    for key, tensor in held(bank, name).items():
        tensor.copy_(tensors[key])


def _of_other_shapes(
    bank: Holder, name: str, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[Site, dict[str, tuple[int, ...]]]]:
    """Sites whose adapter has other shapes than the tensors, with the tensors' shapes by path."""
    for site in bank.sites(name):
        own = site.adapter.state_dict()
        shapes = {path: tuple(tensors[f"{site.name}:{path}"].shape) for path in own}
        if any(shapes[path] != tuple(tensor.shape) for path, tensor in own.items()):
            yield site, shapes


def _fitted(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """A copy of the adapter that has taken the shapes, as far as it can."""
    trial = copy.deepcopy(adapter)
    trial.fit_to(shapes)
    return trial


def _check(name: str, key: str, given: Tensor, mine: Tensor) -> None:
    if given.shape != mine.shape:
        raise StateError(
            f"load_state: {key!r} has shape {tuple(given.shape)}, and the adapter {name!r} has {tuple(mine.shape)}"
        )
    if given.is_floating_point() != mine.is_floating_point():
        raise StateError(f"load_state: {key!r} is {given.dtype}, and the adapter {name!r} has {mine.dtype}")
