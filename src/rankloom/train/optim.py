"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rankloom.errors import StateError
from rankloom.train.drive import Rules
from rankloom.train.run import TrainRun
from rankloom.train.settings import TrainSettings


def build_groups(run: TrainRun, rules: Rules, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameter groups of everything that trains, after every rule's `groups`."""
    parameters = list(dict.fromkeys(run.parameters.values()))
    return rules.groups(run, [{"params": parameters, "lr": settings.lr, "weight_decay": settings.weight_decay}])


def build_optimizer(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW over the groups (Loshchilov & Hutter, ICLR 2019, arXiv 1711.05101)."""
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def factor(step: int, settings: TrainSettings) -> float:
    """What the rate of step `step` (from 0) is multiplied by: (s+1)/W in the warm-up of W steps, then 1 falling to 0.

    With q = (s − W)/(steps − W): cosine ½(1 + cos πq), linear 1 − q, constant 1.
    """
    warmup = settings.warmup
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / (settings.steps - warmup), 1.0)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if settings.schedule == "linear" else 1.0


def build_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings) -> LambdaLR:
    """The schedule; every group keeps its own peak, so ratios between groups hold in each step."""
    return LambdaLR(optimizer, lambda step: factor(step, settings))


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The optimizer's memory with tensors known by key, not by position."""
    keys = {id(p): key for key, p in parameters.items()}
    groups = [{**g, "params": [keys[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    state = {keys[id(p)]: dict(memory) for p, memory in optimizer.state.items()}
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any]
) -> None:
    """Take back what `optimizer_state` gave, dtypes kept. Raises `StateError` where groups or tensors differ."""
    keys = {id(p): key for key, p in parameters.items()}
    mine = [[keys[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    theirs = [g["params"] for g in saved["groups"]]
    if saved["class"] != type(optimizer).__name__ or mine != theirs:
        raise StateError(
            f"the checkpoint's optimizer is {saved['class']} with groups of {[len(g) for g in theirs]} tensors, this "
            f"run's {type(optimizer).__name__} with {[len(g) for g in mine]}: resume with the same adapters and rules"
        )
    for group, old in zip(optimizer.param_groups, saved["groups"]):
        group.update({name: value for name, value in old.items() if name != "params"})
    optimizer.state.clear()
    for key, memory in saved["state"].items():
        parameter = parameters[key]
        optimizer.state[parameter] = {name: _placed(value, parameter) for name, value in memory.items()}


def _placed(value: Any, parameter: nn.Parameter) -> Any:
    """Tensors beside their parameter; counters (no dims) stay where the checkpoint had them."""
    return value.to(parameter.device) if isinstance(value, torch.Tensor) and value.ndim else value
