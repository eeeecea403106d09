"""Rank sampling: at each step all adapters act at one random rank, and only the rows of that rank may move.

DyLoRA, Valipour et al., EACL 2023, arXiv 2210.07558.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter, tensors_by_role
from rankloom.core.rule import Rule, Run
from rankloom.errors import SettingsError
from rankloom.settings import Seed

GEOMETRIC = 0.15
"""Chance to stop at each rank of the geometric distribution."""
Distribution = Literal["uniform", "geometric"] | tuple[float, ...]


class Elastic(Adapter):
    """An adapter that can act at any of its ranks: `r` is the largest, `unit` the step between two."""

    r: int
    unit: int

    @abstractmethod
    def sample(self, rank: int | None) -> None:
        """Speak at `rank` in training until the next call; None: at the rank that was set."""

    @abstractmethod
    def learning(self) -> slice:
        """The rows of the in factors, and columns of the out factors, that may move."""


@dataclass
class RankSampling(Rule):
    """Draws the rank once in a step, for all sites. `distribution`: "uniform", "geometric" (low ranks more often), or a
    probability for each rank; `seed`: of a generator of its own, so that every process draws the same.

    Sites of different ranks share one draw of the cumulative probability. Rows that may not move are put back after the
    optimizer's step: momentum and decay would move them without a gradient.
    """

    distribution: Distribution = "uniform"
    seed: Seed = 0
    _generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False, compare=False)
    _before: list[tuple[nn.Parameter, int, slice, Tensor]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def start(self, run: Run) -> None:
        """Seed the generator. Refuses a run without elastic adapters, or a distribution that does not fit one."""
        found = [probabilities(self.distribution, a.r // a.unit) for a in elastic(run)]
        if not found:
            raise SettingsError("RankSampling needs adapters with many ranks, such as DyLoRA(r=8)")
        self._generator.manual_seed(self.seed)
        self._before = []

    def before_step(self, run: Run) -> None:
        """Draw."""
        self._before = []
        draw = float(torch.rand((), generator=self._generator, dtype=torch.float64))
        for adapter in elastic(run):
            block = inverse(probabilities(self.distribution, adapter.r // adapter.unit), draw)
            adapter.sample(adapter.unit * (1 + block))

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        """Remember the weights."""
        for adapter in elastic(run):
            for _, parameter, role in tensors_by_role(adapter):
                dim = {"in": -2, "out": -1}.get(role)
                if dim is not None and parameter.requires_grad:
                    self._before.append((parameter, dim, adapter.learning(), parameter.detach().clone()))

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Put back what may not move."""
        for parameter, dim, rows, before in self._before:
            moved = parameter.movedim(dim, 0)
            before.movedim(dim, 0)[rows] = moved[rows]
            parameter.copy_(before)
        self._before = []

    def finish(self, run: Run) -> None:
        """Speak at the ranks that were set."""
        for adapter in elastic(run):
            adapter.sample(None)

    def state(self) -> dict[str, Any]:
        """The generator."""
        return {"generator": self._generator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._generator.set_state(state["generator"].cpu())


def elastic(run: Run) -> Iterator[Elastic]:
    """The elastic adapters that are active, combinators' inner ones included."""
    for name in run.bank.trained:
        for _, adapter in run.bank.adapters(name, of=Elastic):
            assert isinstance(adapter, Elastic)
            yield adapter


def probabilities(distribution: Distribution, ranks: int) -> tuple[float, ...]:
    """The chance of each of `ranks` ranks; sums to 1."""
    weights: tuple[float, ...]
    if distribution == "uniform":
        weights = (1.0,) * ranks
    elif distribution == "geometric":
        weights = tuple((1 - GEOMETRIC) ** i for i in range(ranks))
    else:
        weights = _given(distribution, ranks)
    return tuple(w / sum(weights) for w in weights)


def inverse(chances: tuple[float, ...], draw: float) -> int:
    """The first index whose cumulative chance is above `draw` in [0, 1); never one without a chance."""
    last = max(i for i, chance in enumerate(chances) if chance > 0)
    return next((i for i, total in enumerate(accumulate(chances)) if total > draw), last)


def _given(distribution: Any, ranks: int) -> tuple[float, ...]:
    if isinstance(distribution, str) or min(distribution, default=-1) < 0 or not sum(distribution) > 0:
        raise SettingsError(
            f"rank_distribution={distribution!r}: 'uniform', 'geometric', or a list of chances of at least 0, not all 0"
        )
    if len(distribution) != ranks:
        raise SettingsError(
            f"rank_distribution has {len(distribution)} chances, an adapter has {ranks} ranks: one for each"
        )
    return tuple(map(float, distribution))
