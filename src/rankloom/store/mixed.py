"""Mixed precision: one store for each matrix, chosen under a budget of bits by what each would cost.

LQ-LoRA, Guo et al., ICLR 2024, arXiv 2311.12023: costs are squared errors, weighted by the Fisher information
where it is known, of what is left of a matrix beside its low-rank part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal, cast

import torch
from torch import Tensor

from rankloom.errors import SettingsError, suggest
from rankloom.ops.bits import Allocation, allocate
from rankloom.ops.decompose import low_rank
from rankloom.settings import Count
from rankloom.settings.types import NOT_EMPTY
from rankloom.store.base import Bits, Keeping, Store, dense
from rankloom.store.nested import NestedFloat

ScaleDtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Mixed:
    """`stores`: the choice for each name; `bits`: bits per weight; `allocation`: its cost, and how far from optimal."""

    stores: Mapping[str, Store]
    bits: float
    allocation: Allocation


@dataclass(frozen=True)
class MixedBits(Keeping):
    """A store for each weight, within `bits` a weight on average, scales included: the choice of least squared error of
    what the adapter's rank leaves, under Fisher information where a start gathers it.

    Chosen from every combination of `widths`, `scale_widths`, `scale_dtypes`, `blocks` and `double_blocks`; the paper's
    432 are widths and scale widths (2, 3, 4, 8), all three dtypes, blocks (16, 32, 64), double blocks (16, 64, 256).
    `solver`: "lagrange" is fast, "milp" exact (needs scipy).
    """

    bits: float = 3.0
    widths: Annotated[tuple[Bits, ...], NOT_EMPTY] = (2, 3, 4, 8)
    scale_widths: Annotated[tuple[Bits, ...], NOT_EMPTY] = (8,)
    scale_dtypes: Annotated[tuple[ScaleDtype, ...], NOT_EMPTY] = ("float32",)
    blocks: Annotated[tuple[Count, ...], NOT_EMPTY] = (32, 64)
    double_blocks: Annotated[tuple[Count, ...], NOT_EMPTY] = (256,)
    solver: Literal["lagrange", "milp"] = "lagrange"

    def __post_init__(self) -> None:
        least = min(store.bits_per_weight() for store in self.stores())
        if self.bits < least:
            raise SettingsError(f"bits={self.bits}: the smallest of these stores takes {least:.3f} bits a weight")

    def stores(self) -> tuple[NestedFloat, ...]:
        """What may be chosen."""
        return candidates(self.widths, self.scale_widths, self.scale_dtypes, self.blocks, self.double_blocks)

    def choose(self, weights: Mapping[str, Tensor], fisher: Mapping[str, Tensor], r: int) -> Mapping[str, Store]:
        """The allocation of `mix`; on the meta device, where there are no errors, the largest store that fits all."""
        if any(weight.is_meta for weight in weights.values()):
            fitting = [store for store in self.stores() if store.bits_per_weight() <= self.bits]
            return dict.fromkeys(weights, max(fitting, key=NestedFloat.bits_per_weight))
        return mix(weights, self.bits, self.stores(), fisher=fisher or None, r=r, solver=self.solver).stores


def candidates(
    bits: Sequence[int] = (2, 3, 4, 8),
    scale_bits: Sequence[int] = (2, 3, 4, 8),
    scale_dtypes: Sequence[ScaleDtype] = ("bfloat16", "float16", "float32"),
    blocks: Sequence[int] = (16, 32, 64),
    double_blocks: Sequence[int] = (16, 64, 256),
) -> tuple[NestedFloat, ...]:
    """Every combination as a store; by default the 432 of the paper."""
    grid = product(bits, scale_bits, scale_dtypes, blocks, double_blocks)
    return tuple(NestedFloat(b, b0, dtype, block, double) for b, b0, dtype, block, double in grid)


def sizes(weights: Mapping[str, Tensor], stores: Sequence[Store]) -> Tensor:
    """Bits that each weight would take in each store, (weights, stores) float64."""
    counts = torch.tensor([[w.numel()] for w in weights.values()], dtype=torch.float64)
    return counts * torch.tensor([[s.bits_per_weight() for s in stores]], dtype=torch.float64)


def errors(
    weights: Mapping[str, Tensor], stores: Sequence[Store], fisher: Mapping[str, Tensor] | None = None, r: int = 0
) -> Tensor:
    """Squared errors of each weight in each store, (weights, stores) float64; Σ F·(W − Ŵ)² with Fisher information.

    `r`: the best rank-r part (under the same weights) is taken off first, as it will live in an adapter.
    """
    table = torch.empty(len(weights), len(stores), dtype=torch.float64)
    for row, (name, weight) in enumerate(weights.items()):
        importance = None if fisher is None else _fisher_of(name, weight, fisher)
        rest = dense(weight).detach().to(torch.promote_types(weight.dtype, torch.float32))
        if r:
            left, right = low_rank(rest, r, fisher=importance)
            rest = rest - left @ right
        for column, store in enumerate(stores):
            square = (rest - store.round_trip(rest)).square()
            table[row, column] = (square if importance is None else square * importance).sum(dtype=torch.float64)
    return table


def mix(
    weights: Mapping[str, Tensor],
    bits: float,
    stores: Sequence[Store] | None = None,
    *,
    fisher: Mapping[str, Tensor] | None = None,
    r: int = 0,
    solver: Literal["lagrange", "milp"] = "lagrange",
) -> Mixed:
    """The stores that keep `weights` best at no more than `bits` per weight on average.

    `stores`: what may be chosen (default `candidates()`); `fisher`, `r`: see `errors`; `solver`: see `allocate`.
    """
    if not weights:
        raise SettingsError("mix: no weights")
    stores = candidates() if stores is None else stores
    count = sum(w.numel() for w in weights.values())
    found = allocate(errors(weights, stores, fisher, r), sizes(weights, stores), bits * count, solver)
    chosen = {name: stores[c] for name, c in zip(weights, found.choice)}
    return Mixed(cast(Mapping[str, Store], chosen), found.size / count, found)


def _fisher_of(name: str, weight: Tensor, fisher: Mapping[str, Tensor]) -> Tensor:
    if name not in fisher:
        raise SettingsError(f"no Fisher information for {name!r}{suggest(name, fisher)}")
    if fisher[name].shape != weight.shape:
        raise SettingsError(
            f"Fisher information of {name!r} has shape {tuple(fisher[name].shape)}, the weight {tuple(weight.shape)}"
        )
    return fisher[name]
