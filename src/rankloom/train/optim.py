"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rankloom.errors import MissingExtra, SettingsError, StateError
from rankloom.optim.paged import PagedAdamW
from rankloom.train.drive import Rules
from rankloom.train.run import TrainRun
from rankloom.train.settings import TrainSettings


def build_groups(run: TrainRun, rules: Rules, settings: TrainSettings) -> list[dict[str, Any]]:
    """Parameter groups of everything that trains, after every rule's `groups`."""
    parameters = list(dict.fromkeys(run.parameters.values()))
    return rules.groups(run, [{"params": parameters, "lr": settings.lr, "weight_decay": settings.weight_decay}])


def build_optimizer(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW over the groups (Loshchilov & Hutter, ICLR 2019, arXiv 1711.05101), its memory kept as `optimizer` says.

    Raises `MissingExtra` without bitsandbytes, `SettingsError` where it cannot do this on the parameters' device.
    """
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **common)
    if settings.optimizer == "paged_adamw":
        return PagedAdamW(groups, **common)
    return _eight_bit(groups, settings.optimizer, common)


def _eight_bit(groups: list[dict[str, Any]], name: str, common: Mapping[str, Any]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with moments in 8 bits, after one step of it on a parameter of no consequence."""
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError as error:
        raise MissingExtra("bitsandbytes", "bnb", f"optimizer={name!r}") from error
    device = next(p.device for group in groups for p in group["params"])
    paged = name == "paged_adamw_8bit"
    if paged and device.type == "cpu":
        raise SettingsError(
            f"optimizer={name!r} pages between a GPU and the host, and the model is on the CPU: use 'adamw_8bit' for "
            "small moments, or 'paged_adamw'"
        )
    make = PagedAdamW8bit if paged else AdamW8bit
    trial = nn.Parameter(torch.zeros(8192, device=device))
    trial.grad = torch.ones_like(trial)
    try:
        if device.type != "meta":
            make([trial], **common).step()
    except Exception as error:
        raise SettingsError(
            f"optimizer={name!r}: the installed bitsandbytes cannot step on {device.type} ({error}); upgrade it, or "
            "use 'paged_adamw' or 'adamw'"
        ) from error
    made: torch.optim.Optimizer = make(groups, **common)
    return made


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
    if isinstance(optimizer, PagedAdamW):
        optimizer.flush()
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
        optimizer.state[parameter] = {name: _placed(value, parameter, optimizer) for name, value in memory.items()}


def _placed(value: Any, parameter: nn.Parameter, optimizer: Any) -> Any:
    """Moments where the optimizer wants them, other tensors beside their parameter; counters (no dims) stay where the
    checkpoint had them.
    """
    if not isinstance(value, torch.Tensor) or not value.ndim:
        return value
    if hasattr(optimizer, "get_state_buffer") and value.shape == parameter.shape:
        return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)
