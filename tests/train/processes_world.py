"""What runs in each of two processes: every method's run, and whatever else one launch can try. Results go to files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from train_world import llama, mlp, plan_of, points, settings, texts

import rankloom as rl
from rankloom.core.attach import as_plan
from rankloom.core.plan import Plan
from rankloom.errors import RankloomError
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.train.fit import Result, fit

TARGETS = {"target_modules": ["q_proj", "o_proj", "up_proj"]}
PLANS: dict[str, Callable[[], Plan]] = {
    "lora": lambda: as_plan(rl.LoRA(r=3), TARGETS),
    "dora": lambda: as_plan(rl.DoRA(rl.LoRA(r=3)), TARGETS),
    "vera": lambda: as_plan(rl.VeRA(r=4), TARGETS),
    "adalora": lambda: as_plan(rl.AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1), TARGETS),
    "dylora": lambda: as_plan(rl.DyLoRA(r=4), TARGETS),
    "lora+ and whole": lambda: as_plan(rl.LoRA(r=3), {**TARGETS, "modules_to_save": ["norm"], "bias": "all"}),
    "nf4": lambda: as_plan(rl.LoRA(r=3), TARGETS),
}
STEPS = 6


def model_of(name: str, seed: int = 1) -> nn.Module:
    """In float64, so that the order of summation does not show."""
    model = llama().double()
    if name == "nf4":
        keep(model, {f"{n}.weight": NormalFloat() for n, m in model.model.named_modules() if type(m) is nn.Linear})
    torch.manual_seed(seed)
    rl.attach(model, PLANS[name]())
    return model


def run(name: str, rank: int = 0, world: int = 1, **changes: Any) -> tuple[nn.Module, Result]:
    """The run of a method. Alone it accumulates the batches that two processes share."""
    out, resume = changes.pop("out", None), changes.pop("resume", False)
    model = model_of(name, seed=1 + rank)
    chosen = settings(**{"steps": STEPS, "accumulate": 2 // world, "eval_every": 3, **changes})
    rules = [rl.LoRAPlus()] if name == "lora+ and whole" else []
    return model, fit(model, texts(), settings=chosen, evaluate=texts(3), rules=rules, out=out, resume=resume)


def told(model: nn.Module, result: Result) -> dict[str, Any]:
    bank = model.rankloom
    return {
        "losses": result.losses,
        "metrics": [result.metrics["before"]["loss"], result.metrics["after"]["loss"]],
        "tokens": result.tokens,
        "tensors": {k: p.detach().flatten().tolist() for k, p, _ in bank.tensors("default")},
    }
