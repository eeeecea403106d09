"""Finding factor pairs and triplets by role."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def by_owner(tensors: Iterable[tuple[str, nn.Parameter, str]]) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """(owner path, {role: parameter}) for each module that owns tensors; paths as `Bank.tensors` gives them."""
    owners: dict[str, dict[str, nn.Parameter]] = {}
    for key, parameter, role in tensors:
        prefix, _, leaf = key.rpartition(":")
        owner = f"{prefix}:{leaf.rpartition('.')[0]}"
        owners.setdefault(owner, {}).setdefault(role, parameter)
    yield from owners.items()
