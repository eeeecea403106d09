"""Accelerate, kept to one run: autocast, loss scaling and processes come from it, its global state does not stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankloom.errors import MissingExtra, SettingsError
from rankloom.train.settings import TrainSettings


@contextmanager
def accelerator(device: torch.device, settings: TrainSettings) -> Iterator[Any]:
    """An Accelerator of this run's own; one that the process made before is untouched and works on afterwards."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError as error:
        raise MissingExtra("accelerate", "hf", "training") from error
    if settings.precision == "fp16" and device.type == "cpu":
        raise SettingsError("precision='fp16' needs a GPU, and the model is on the CPU: use 'bf16' or 'no'")
    distributed = "LOCAL_RANK" in os.environ or _initialised()
    singletons = [AcceleratorState, GradientState] + ([] if distributed else [PartialState])
    before = [(cls, cls._shared_state) for cls in singletons]
    try:
        for cls in singletons:
            cls._shared_state = {}
        yield Accelerator(cpu=device.type == "cpu", mixed_precision=settings.precision)
    finally:
        for cls, state in before:
            cls._shared_state = state


def _initialised() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def distributed_model(engine: Any, model: nn.Module) -> Iterator[nn.Module]:
    """What a step calls: the model itself, or with several processes Accelerate's wrapper around it."""
    if engine.num_processes == 1:
        yield model
        return
    own: dict[str, Any] = {k: v for k, v in model.__dict__.items() if k in ("forward", "_original_forward")}
    try:
        yield engine.prepare_model(model)
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        model.__dict__.update(own)


def scaler_state(engine: Any) -> dict[str, Any]:
    """The loss scaler's memory; empty without one."""
    return {} if engine.scaler is None else dict(engine.scaler.state_dict())


def restore_scaler(engine: Any, state: dict[str, Any]) -> None:
    """Take it back."""
    if engine.scaler is not None and state:
        engine.scaler.load_state_dict(state)
