"""The gate of a task: softmax of a linear map of a learnt embedding of the row's task (MOELoRA, arXiv 2310.18339).

weights = softmax(W E[task] / τ), E (tasks, dim), W (n, dim). All tokens of a row have the same weights, so the mixture
merges for a known task. A cluster id (MoCLE, arXiv 2312.12379) is a task by another name: `column="cluster"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.core.base import Base
from rankloom.core.gate import Gate, Router, Source, rows_of
from rankloom.core.site import Site
from rankloom.errors import SettingsError, StateError
from rankloom.gates.scores import Scores, check_temperature


@dataclass(frozen=True)
class Task(Gate):
    """`tasks`: how many ids there are, from 0; `dim` of the embedding; `column` of the batch that has the ids, an int
    for all rows or a tensor (rows,); `temperature` τ; `share`: one embedding and map for all sites; `unknown`: the id
    where the batch has no such column (None: that is refused).
    """

    source: ClassVar[Source] = "task"
    tasks: int = 2
    dim: int = 64
    column: str = "task"
    temperature: float = 1.0
    share: bool = False
    unknown: int | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.tasks < 1 or self.dim < 1:
            raise SettingsError(f"tasks={self.tasks}, dim={self.dim}: at least one of each")

    @property
    def constant(self) -> bool:
        """A row has one task."""
        return True

    def build(self, site: Site, n: int) -> Router:
        """The task's embedding and scores, for one site or shared by all."""
        return TaskRouter(site, n, self)


class TaskRouter(Router):
    """`table`: embeddings and their scores, own or borrowed."""

    def __init__(self, site: Site, n: int, gate: Task) -> None:
        super().__init__(site, n)
        self.name, self.unknown = gate.column, gate.unknown
        if not gate.share:
            self.table = TaskTable(site, n, gate)
            return
        key = f"{gate.column}_{n}"
        site.shared.module(key, lambda: TaskTable(site, n, gate))
        self.borrow(site.shared, table=key)

    def reset(self) -> None:
        self.table.reset()

    def forward(self, x: Any, base: Base) -> Tensor:
        known = self.unknown is None or self.name in base.context
        ids = torch.as_tensor(self.column(base, self.name, x) if known else self.unknown)
        if x is None and ids.ndim:
            raise self.no_matrix(f"has a {self.name} for each row: give one for all, context={{{self.name!r}: 0}}")
        self._check(ids)
        weights, probabilities = self.table(ids.to(self.table.embedding.device, torch.long))
        if x is None:
            return weights  # type: ignore[no-any-return]
        base.note("router", probabilities)
        return rows_of(weights, x, self.site_name) if ids.ndim else weights

    def _check(self, ids: Tensor) -> None:
        if ids.ndim > 1 or ids.is_floating_point():
            raise StateError(
                f"{self.name!r} of shape {tuple(ids.shape)}, {ids.dtype}: ids are ints, one for each row or one for all"
            )
        if torch.compiler.is_compiling() or ids.device.type != "cpu":
            return  # looking at values would make the host wait
        count = self.table.embedding.shape[0]
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < count:
            raise StateError(f"{self.name}={ids.tolist()}: the gate at {self.site_name!r} knows 0 to {count - 1}")


class TaskTable(nn.Module):
    """`embedding` (tasks, dim) ~ N(0, 1), and `scores` of it."""

    def __init__(self, site: Site, n: int, gate: Task) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(gate.tasks, gate.dim, dtype=site.dtype, device=site.device))
        self.scores = Scores(site, n, gate.dim, "none", None, gate.temperature)

    def reset(self) -> None:
        """Fill both."""
        nn.init.normal_(self.embedding)
        self.scores.reset()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, probabilities) (…, n) of task ids."""
        found: tuple[Tensor, Tensor] = self.scores(F.embedding(ids, self.embedding))
        return found
