"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rankloom.errors import MissingExtra, SettingsError
from rankloom.optim.paged import PagedAdamW
from rankloom.train.ruleset import RuleSet
from rankloom.train.run import TrainRun
from rankloom.train.settings import TrainSettings


def build_groups(run: TrainRun, rules: RuleSet, settings: TrainSettings) -> list[dict[str, Any]]:
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


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its own peak times `factor`, so that ratios between groups hold in each step.

    The peak, `initial_lr`, is the rate that the group was made with; groups may join at any time.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
