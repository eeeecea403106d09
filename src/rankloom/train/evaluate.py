"""Evaluation during training: evaluation mode, no gradients, and no trace in the random state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import nn

from rankloom.errors import DataError, SettingsError
from rankloom.train.data.batches import Batches
from rankloom.train.loss import Loss, Weigh, move
from rankloom.train.modes import mode
from rankloom.train.processes import Processes
from rankloom.train.rng import untouched_rng
from rankloom.train.run import TrainRun
from rankloom.train.stream import dealt

Evaluate = Iterable[Any] | Callable[[nn.Module], float | Mapping[str, float]]


def evaluate_run(
    evaluate: Evaluate, run: TrainRun, loss: Loss, weigh: Weigh, engine: Any, processes: Processes
) -> dict[str, float]:
    """Metrics of the model as it is: `{"loss": …}` over batches, or what the function `evaluate(model)` returns."""
    with untouched_rng(), mode(run.model, False), torch.no_grad():
        if isinstance(evaluate, Iterable):
            with engine.autocast():
                return {"loss": mean_loss(evaluate, run, loss, weigh, processes)}
        return _as_metrics(evaluate(run.model))


def mean_loss(batches: Iterable[Any], run: TrainRun, loss: Loss, weigh: Weigh, processes: Processes) -> float:
    """Mean loss over batches, each weighed by what it counts; several processes take turns, unless dealt out already.

    All of them call the model equally often, which a sharded base needs: one without a turn goes along for nothing.
    """
    total, weight, each = 0.0, 0.0, _once(batches)
    turns = Processes() if dealt(batches, processes) else processes
    while turn := list(islice(each, turns.world)):
        mine = turn[min(turns.rank, len(turn) - 1)]
        n = weigh(mine) if turns.rank < len(turn) else 0
        if n or processes.world > 1:
            found = float(loss(run.model, move(mine, run.device)))
            total += n * found if n else 0.0
            weight += n
    total, weight = processes.sum(total, weight)
    if not weight:
        raise DataError("evaluate gave no batch with anything to predict; a generator can be used only once")
    return total / weight


def _once(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, Batches):
        return (batches.batch_at(i) for i in range(len(batches)))
    return iter(batches)


def _as_metrics(found: Any) -> dict[str, float]:
    if isinstance(found, Mapping):
        return {str(k): float(v) for k, v in found.items()}
    if isinstance(found, (int, float, torch.Tensor)):
        return {"loss": float(found)}
    raise SettingsError(f"evaluate returned a {type(found).__name__}: return a number (the loss) or a dict of numbers")


def loss_of(metrics: Mapping[str, float]) -> float:
    """The number that early stopping and the best checkpoint go by."""
    if "loss" not in metrics:
        raise SettingsError(
            f"evaluate returned {', '.join(map(repr, metrics)) or 'nothing'}; "
            "patience and the best checkpoint need 'loss'"
        )
    return metrics["loss"] if not math.isnan(metrics["loss"]) else math.inf
