"""Whether autocast chooses the dtype of products."""

from __future__ import annotations

import torch
from torch import Tensor


def autocasts(tensor: Tensor) -> bool:
    """True if autocast is on where `tensor` lies; a meta device has none."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)
