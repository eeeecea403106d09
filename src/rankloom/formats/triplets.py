"""AdaLoRA's triplets in the number that a file has."""

from __future__ import annotations

import torch
from torch import nn

from rankloom.methods.adalora import AdaLoRAAdapter


def resize(adapter: AdaLoRAAdapter, rank: int) -> None:
    """Room for `rank` triplets, unfilled; the scale stays that of `init_r`."""
    shapes = {"A": (rank, adapter.A.shape[-1]), "E": (rank, 1), "B": (adapter.B.shape[-2], rank)}
    for name, shape in shapes.items():
        old = getattr(adapter, name)
        setattr(adapter, name, nn.Parameter(torch.zeros(shape, dtype=old.dtype, device=old.device)))
