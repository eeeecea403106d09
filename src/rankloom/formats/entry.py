"""One tensor of an adapter file, seen from the adapter: how to get it for writing and put it back when reading."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Entry(NamedTuple):
    """`key` in the file; `get` gives the tensor in the file's shape (also on the meta device); `put` takes it back."""

    key: str
    get: Callable[[], Tensor]
    put: Callable[[Tensor], None]


def plain(key: str, tensor: Tensor) -> Entry:
    """The tensor as it is."""
    return mapped(key, tensor, _same, _same)


def mapped(key: str, tensor: Tensor, out: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Entry:
    """The tensor through a bijection: `out` to the file's form, `back` from it."""

    def put(value: Tensor) -> None:
        tensor.detach().copy_(back(value.to(tensor.dtype)))

    return Entry(key, lambda: out(tensor.detach()), put)


def _same(tensor: Tensor) -> Tensor:
    return tensor
