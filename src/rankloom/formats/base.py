"""What a base model says of itself, and a copy of it without weights to try an adapter on."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"
"""Where accelerate keeps what moves offloaded weights (and often the weights); it comes with a forward of its own."""


def base_name(model: nn.Module) -> str | None:
    """The name or path that the model was loaded from, if it knows."""
    for owner in (model, getattr(model, "config", None)):
        for attribute in ("name_or_path", "_name_or_path"):
            name = getattr(owner, attribute, None)
            if isinstance(name, str) and name:
                return name
    return None


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device: its structure and shapes, ties included, and none of its numbers."""
    memo: dict[int, Any] = {id(t): _meta(t) for t in chain(model.parameters(), model.buffers())}
    offloaded = [m.__dict__[HOOK] for m in model.modules() if m.__dict__.get(HOOK) is not None]
    copied = copy.deepcopy(model, memo | {id(hook): None for hook in offloaded})
    for module in copied.modules():
        if HOOK in module.__dict__:
            for attribute in (HOOK, "_old_forward", "forward"):
                module.__dict__.pop(attribute, None)
    return copied


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
