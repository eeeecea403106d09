"""Whether autocast chooses the dtype of products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocasts(tensor: Tensor) -> bool:
    """True if autocast is on where `tensor` lies; a meta device has none."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def own_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """A block in which products keep the dtype of their factors, autocast or not, where `tensor` lies."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()
