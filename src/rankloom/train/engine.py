"""Accelerate, kept to one run: autocast, loss scaling and processes come from it, its global state does not stay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rankloom.errors import MissingExtra, SettingsError
from rankloom.train.processes import Processes
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
    singletons = [AcceleratorState, GradientState] + ([] if started_together() else [PartialState])
    before = [(cls, cls._shared_state) for cls in singletons]
    try:
        for cls in singletons:
            cls._shared_state = {}
        yield Accelerator(cpu=device.type == "cpu", mixed_precision=settings.precision)
    finally:
        for cls, state in before:
            cls._shared_state = state


def join(device_type: str) -> Processes:
    """The processes that torchrun or `accelerate launch` started with this one, joined in a group; alone without."""
    if not started_together():
        return Processes()
    try:
        from accelerate.state import PartialState
    except ImportError as error:
        raise MissingExtra("accelerate", "hf", "training") from error
    return processes_of(PartialState(cpu=device_type == "cpu"))


def processes_of(state: Any) -> Processes:
    """The processes that Accelerate knows."""
    return Processes(state.process_index, state.num_processes, state.device)


def started_together() -> bool:
    """True where a launcher started this process, or it has joined others by itself."""
    return "LOCAL_RANK" in os.environ or (torch.distributed.is_available() and torch.distributed.is_initialized())


def scaler_state(engine: Any) -> dict[str, Any]:
    """The loss scaler's memory; empty without one."""
    return {} if engine.scaler is None else dict(engine.scaler.state_dict())


def restore_scaler(engine: Any, state: dict[str, Any]) -> None:
    """Take it back."""
    if engine.scaler is not None and state:
        engine.scaler.load_state_dict(state)
