"""The base's own answers: the same model with no adapter active, no second copy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.bank import Bank
from rankloom.errors import StateError

Cache = MutableMapping[str, Tensor]


def base_answers(
    model: nn.Module,
    batch: Mapping[str, Any],
    read: Callable[[nn.Module, Mapping[str, Any]], Tensor],
    cache: Cache | None = None,
) -> Tensor:
    """`read(model, batch)` with the base only: in evaluation mode, without gradients and without random numbers.

    `cache`: answers by the content of the batch, so that each batch is asked for once; as long as the base stays as it
    is (a rule that folds wants none). Raises `StateError` for a model without adapters: it is its own base.
    """
    bank = getattr(model, "rankloom", None)
    if not isinstance(bank, Bank):
        raise StateError(
            f"this {type(model).__name__} has no adapters, so there is no base beside it: rankloom.attach(model, …)"
        )
    key = "" if cache is None else content(batch)
    if cache is not None and key in cache:
        return cache[key]
    with torch.no_grad(), bank.using(), evaluating(model):
        found = read(model, batch)
    if cache is not None:
        cache[key] = found
    return found


def content(batch: Mapping[str, Any]) -> str:
    """A digest of the columns of a batch: names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        digest.update(f"{name}:".encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module's own mode is put back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag
