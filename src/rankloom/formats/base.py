"""What a base model says of itself, and a copy of it without weights to try an adapter on."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.graft import Grafted
from rankloom.core.own_methods import TELLERS
from rankloom.core.targets import base_modules

HOOK = "_hf_hook"
"""Where accelerate keeps what moves offloaded weights (and often the weights); it comes with a forward of its own."""
OURS = ("_rankloom", "rankloom", *TELLERS)
"""What grafting and attaching leave among the attributes of a module."""
ATOMS = frozenset({bool, int, float, str, type(None), torch.dtype})
CONTAINERS = frozenset({dict, list, set, OrderedDict})


def base_name(model: nn.Module) -> str | None:
    """The name or path that the model was loaded from, if it knows."""
    for owner in (model, getattr(model, "config", None)):
        for attribute in ("name_or_path", "_name_or_path"):
            name = getattr(owner, attribute, None)
            if isinstance(name, str) and name:
                return name
    return None


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the base on the meta device: its structure and shapes, ties included, no numbers and no adapters."""
    modules = {id(module): module for _, module in base_modules(model)}
    twins: dict[int, nn.Module] = {key: _blank(module) for key, module in modules.items()}
    memo: dict[int, Any] = {id(t): _meta(t) for m in modules.values() for t in _tensors(m)}
    memo |= {id(hook): None for m in modules.values() if (hook := vars(m).get(HOOK)) is not None} | twins
    for key, module in modules.items():
        if not isinstance(module, torch.jit.ScriptModule):
            vars(twins[key]).update(_hollow(module, memo))
    return twins[id(model)]


def _blank(module: nn.Module) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return nn.Module()  # no adapter can be in there
    cls = type(module).rankloom_original if isinstance(module, Grafted) else type(module)
    return cls.__new__(cls)


def _hollow(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    """The attributes of a module for its twin: what `memo` knows in place of what it is for, all else copied."""
    left_out = {*OURS, *((HOOK, "_old_forward", "forward") if HOOK in vars(module) else ())}
    said = {key: value for key, value in vars(module).items() if key not in left_out}
    if isinstance(module, Grafted):
        said["_modules"] = {key: child for key, child in module._modules.items() if key != "adapters"}
    return {key: _copied(value, memo) for key, value in said.items()}


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy; empty containers and plain values, of which a model has thousands, by the short way."""
    if type(value) in ATOMS:
        return value
    if type(value) in CONTAINERS and not value:
        return type(value)()
    if type(value) is dict and all(v is None or id(v) in memo for v in value.values()):
        return {k: None if v is None else memo[id(v)] for k, v in value.items()}
    return copy.deepcopy(value, memo)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def _meta(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
