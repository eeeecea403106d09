"""The memory of an optimizer with tensors known by key: saved, taken back, and carried over to other tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.errors import StateError
from rankloom.optim.paged import PagedAdamW


def optimizer_state(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The optimizer's memory with tensors known by key, not by position."""
    if isinstance(optimizer, PagedAdamW):
        optimizer.flush()
    keys = {id(p): key for key, p in parameters.items()}
    groups = [{**g, "params": [keys[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    state = {keys[id(p)]: dict(memory) for p, memory in optimizer.state.items()}
    return {"class": type(optimizer).__name__, "groups": groups, "state": state}


def restore_optimizer(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any]) -> None:
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


@torch.no_grad()
def exchange(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, kept: tuple[int, Tensor] | None = None
) -> None:
    """Let the optimizer step `new` in the place of `old`, which it forgets.

    `kept`: (dim, indices) of what `new` has taken over from `old`: memory of the tensor's shape is taken over with it,
    where all of it can be (moments in 8 bits lie in blocks and cannot); otherwise it starts anew.
    """
    if isinstance(optimizer, PagedAdamW):
        optimizer.flush()
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    memory = optimizer.state.pop(old, None)
    if not memory or kept is None:
        return
    dim, indices = kept
    each = [v for v in memory.values() if isinstance(v, Tensor) and v.ndim]
    if all(v.shape == old.shape and v.is_floating_point() for v in each):
        optimizer.state[new] = {
            name: _placed(value.index_select(dim, indices.to(value.device)), new, optimizer)
            if isinstance(value, Tensor) and value.ndim
            else value
            for name, value in memory.items()
        }


def _placed(value: Any, parameter: nn.Parameter, optimizer: Any) -> Any:
    """Moments where the optimizer wants them, other tensors beside their parameter; counters (no dims) stay where the
    checkpoint had them.
    """
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if hasattr(optimizer, "get_state_buffer") and value.shape == parameter.shape:
        return optimizer.get_state_buffer(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)
