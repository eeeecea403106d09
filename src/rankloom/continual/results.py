"""The matrix of results of a sequence of tasks, and the numbers that are read off it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankloom.errors import SettingsError

Row = tuple[float, ...]


@dataclass(frozen=True)
class Results:
    """R[t, i]: the score on task i after training on task t (both from 0), higher is better; `before`: of the model
    before the first task. Lopez-Paz & Ranzato, NeurIPS 2017, arXiv 1706.08840; forgetting: Chaudhry et al., ECCV 2018,
    arXiv 1801.10112.
    """

    names: tuple[str, ...]
    before: Row
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        for row in (self.before, *self.rows):
            if len(row) != len(self.names) or not all(map(math.isfinite, row)):
                raise SettingsError(f"a row of results is {row}: one finite number for each of {len(self.names)} tasks")
        if len(self.rows) > len(self.names):
            raise SettingsError(f"{len(self.rows)} rows of results for {len(self.names)} tasks")

    def __getitem__(self, place: tuple[int, int]) -> float:
        trained, task = place
        return self.rows[trained][task]

    @property
    def finished(self) -> bool:
        """Whether every task was trained on."""
        return len(self.rows) == len(self.names)

    @property
    def average(self) -> float:
        """Mean over all tasks after the last one."""
        return _mean(self._last())

    @property
    def forgetting(self) -> float:
        """Mean over all tasks but the last of (best score so far before the last task) − (last score)."""
        last = self._last()
        return _mean([max(row[i] for row in self.rows[:-1]) - last[i] for i in range(len(last) - 1)])

    @property
    def backward_transfer(self) -> float:
        """Mean over all tasks but the last of R[T, i] − R[i, i]: below 0 where later tasks harm."""
        last = self._last()
        return _mean([last[i] - self.rows[i][i] for i in range(len(last) - 1)])

    @property
    def forward_transfer(self) -> float:
        """Mean over all tasks but the first of R[i − 1, i] − before[i]: above 0 where earlier tasks help."""
        self._last()
        return _mean([self.rows[i - 1][i] - self.before[i] for i in range(1, len(self.names))])

    def after(self, row: Mapping[str, float] | Sequence[float]) -> Results:
        """With one more row."""
        values = [row[name] for name in self.names] if isinstance(row, Mapping) else row
        return Results(self.names, self.before, (*self.rows, tuple(map(float, values))))

    def _last(self) -> Row:
        if not self.finished:
            raise SettingsError(
                f"{len(self.rows)} of {len(self.names)} tasks are done: the numbers come after the last"
            )
        return self.rows[-1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
