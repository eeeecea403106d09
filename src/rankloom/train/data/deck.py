"""The rows of a data set, and their order in each epoch: a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rankloom.errors import DataError
from rankloom.train.data.order import GOLDEN, permutation
from rankloom.train.data.packing import Packs, best_fit, joined, singles
from rankloom.train.data.prepare import Prepared


@dataclass(frozen=True)
class Deck:
    """`rows`: of all sources, one after the other; `counts`: rows of each source; `taken`: how many of them an epoch
    has; `ratios`: as they were asked for, empty for one source.
    """

    rows: Packs
    counts: tuple[int, ...]
    taken: tuple[int, ...]
    ratios: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Rows of an epoch."""
        return sum(self.taken)

    def order(self, seed: int, epoch: int, shuffle: bool) -> Tensor:
        """The rows of an epoch (int64, shape [size])."""
        chosen = torch.cat([self._chosen(k, seed, epoch, shuffle) for k in range(len(self.counts))])
        return chosen[permutation(self.size, seed, epoch)] if shuffle else chosen

    def _chosen(self, source: int, seed: int, epoch: int, shuffle: bool) -> Tensor:
        """The rows of one source: the next ones of its own endless order, which is a new one each time through."""
        count, taken = self.counts[source], self.taken[source]
        first = sum(self.counts[:source])
        if taken == count:
            return torch.arange(first, first + count)
        draws = torch.arange(epoch * taken, (epoch + 1) * taken)
        found = torch.empty_like(draws)
        for turn in range(int(draws[0]) // count, int(draws[-1]) // count + 1):
            here = draws // count == turn
            own = permutation(count, seed + (source + 1) * GOLDEN, turn) if shuffle else torch.arange(count)
            found[here] = own[draws[here] % count]
        return first + found


def deck(prepared: Prepared, packing: bool) -> Deck:
    """The rows of prepared data: an example each, or several whole ones of the same source."""
    lengths, parts, ratios = prepared.examples.lengths, prepared.parts or (len(prepared),), prepared.records.ratios
    starts = [0, *accumulate(parts)]
    packs = [
        best_fit(lengths[start : start + n], prepared.max_length) if packing else singles(n)
        for start, n in zip(starts, parts)
    ]
    counts = tuple(map(len, packs))
    rows = packs[0] if len(packs) == 1 else joined(packs, starts)
    return Deck(rows, counts, _taken(counts, ratios, prepared.records.source), ratios)


def _taken(counts: Sequence[int], ratios: Sequence[float], source: str) -> tuple[int, ...]:
    """Rows of each source in an epoch: the ratios, until the first source is used up."""
    if len(counts) == 1:
        return tuple(counts)
    most = min(count / ratio for count, ratio in zip(counts, ratios))
    found = tuple(min(count, round(most * ratio)) for count, ratio in zip(counts, ratios))
    if not all(found):
        raise DataError(
            f"{source}: in the ratios {', '.join(f'{r:g}' for r in ratios)}, the {', '.join(map(str, counts))} rows of "
            "the sources leave one of them out of every epoch; give ratios nearer to their sizes, or more data"
        )
    return found
