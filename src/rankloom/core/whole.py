"""Tensors trained whole beside the adapters: modules_to_save, biases, and single embedding rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.selection import Weight
from rankloom.core.site import Site


@dataclass(frozen=True)
class Whole(Method):
    """The tensor itself is trained: W' = value, any shape; buffers (running statistics) are owned but not trained."""

    def build(self, site: Site) -> Adapter:
        return WholeAdapter(site)


class WholeAdapter(Adapter):
    """`value` has the parameter's own shape and starts as a copy of it."""

    roles = {"value": "whole"}

    def __init__(self, site: Site) -> None:
        super().__init__(site.name)
        value = torch.empty(site.weight_shape, dtype=site.dtype, device=site.device)
        if site.buffer:
            self.register_buffer("value", value)
        else:
            self.value = nn.Parameter(value)

    def reset(self, base: Base) -> None:
        with torch.no_grad():
            self.value.copy_(base.kind.tensor(base.layer))

    def whole(self) -> Tensor:
        return self.value

    def delta(self, base: Base) -> Tensor:
        return self.value - base.kind.tensor(base.layer)

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        if out is y and not isinstance(weight, Tensor) and weight == 1 and not self.hooked:
            return self.value.to(y.dtype)
        return super().add(out, x, y, base, weight)


@dataclass(frozen=True)
class TokenRows(Method):
    """Rows `indices` of an embedding are trained; a tied output head follows. Values are shared, (n, dim)."""

    indices: tuple[int, ...]
    source: str
    """Name of the embedding whose rows these are: the key of the shared values."""

    def build(self, site: Site) -> Adapter:
        return TokenRowsAdapter(site, self)


class TokenRowsAdapter(Adapter):
    """`rows` (n, dim): the new values of the embedding rows `indices`, borrowed by the embedding and its tied head."""

    def __init__(self, site: Site, method: TokenRows) -> None:
        super().__init__(site.name)
        self.lookup = site.kind.name == "embedding"
        dim = site.out if self.lookup else site.in_
        key = tokens_key(method.source)
        site.shared.provide(
            key,
            lambda: torch.empty(len(method.indices), dim, dtype=site.dtype, device=site.device),
            role="whole",
            trainable=True,
        )
        self.borrow(site.shared, rows=key)
        self.register_buffer("indices", torch.tensor(method.indices, device=site.device), persistent=False)

    def reset(self, base: Base) -> None:
        if self.lookup:  # the tied head has the same rows, and may not be there yet
            with torch.no_grad():
                self.rows.copy_(self._old(base))

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        change = (self.rows - self._old(base)).to(y.dtype)
        if not self.lookup:
            out = torch.zeros_like(y)
            return out.index_add(-1, self.indices, nn.functional.linear(x, change))
        hit = x[..., None] == self.indices
        return base.kind.looked_up(base.layer, hit.to(y.dtype) @ change)

    def delta(self, base: Base) -> Tensor:
        change = self.rows - self._old(base)
        zero = torch.zeros_like(base.matrix(), dtype=change.dtype)
        return zero.index_add(1, self.indices, change.T) if self.lookup else zero.index_add(0, self.indices, change)

    def _old(self, base: Base) -> Tensor:
        matrix = base.matrix()
        return matrix[:, self.indices].T if self.lookup else matrix[self.indices]


def tokens_key(source: str) -> str:
    """Key of the shared token rows of the embedding `source` (a parameter key has no dots)."""
    return "token_rows__" + source.replace(".", "__")
