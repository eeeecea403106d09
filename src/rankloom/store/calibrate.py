"""What data says about weights: magnitudes of a layer's input, and Fisher information. Hooks only observe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.errors import StateError, UnreachedError
from rankloom.store.base import Packed

FLOOR = 1e-4


@torch.no_grad()
def activation_scales(
    layers: Mapping[str, nn.Module], batches: Iterable[Any], run: Callable[[Any], Any]
) -> dict[str, Tensor]:
    """c (in,) float32 for each layer: max over batches of mean over tokens |x_j|, at least 1e-4, over √(min·max).

    LQER, arXiv 2402.02446 and released code. `run(batch)` calls the model. Raises `UnreachedError` for a layer that no
    batch reaches.
    """
    found = _gathered(layers, batches, run, lambda x: x.abs().mean(0), torch.maximum)
    return {name: balanced(found[name]) for name in layers}


@torch.no_grad()
def hessians(layers: Mapping[str, nn.Module], batches: Iterable[Any], run: Callable[[Any], Any]) -> dict[str, Tensor]:
    """Σ x xᵀ (in, in) over every input row of each layer, float32: the Hessian of its squared output error, halved.

    GPTQ, arXiv 2210.17323. `run(batch)` calls the model. Raises `UnreachedError` for a layer that no batch reaches.
    """
    return _gathered(layers, batches, run, lambda x: x.T @ x, torch.add)


def balanced(magnitude: Tensor) -> Tensor:
    """Magnitudes (in,), at least 1e-4, divided by the geometric mean of the smallest and the largest."""
    c = magnitude.float().clamp_min(FLOOR)
    return c / (c.min() * c.max()).sqrt()


def _gathered(
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    measure: Callable[[Tensor], Tensor],
    join: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """`measure` of the input (rows, in) of each layer, float32, joined over all calls."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def observe(layer: nn.Module, args: Any) -> None:
            x = args[0].detach()
            now = measure(x.reshape(-1, x.shape[-1]).float())
            found[name] = join(found[name], now) if name in found else now

        return observe

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name in layers.keys() - found.keys():
        raise UnreachedError(f"no batch reached the layer {name!r}: its input is not known; leave it out, or call it")
    return found


def fisher(
    weights: Mapping[str, nn.Parameter], examples: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Diagonal empirical Fisher information of each weight: Σ over examples of its squared gradient, float32.

    `loss(example)` is that of *one* example: a batch's gradient squared is something else. LQ-LoRA, arXiv 2311.12023.
    Weights that the loss does not reach get zeros; flags and gradients stay as they are. Raises `StateError` for
    a packed weight, which has no gradient.
    """
    for name, w in weights.items():
        if isinstance(w, Packed):
            raise StateError(f"{name!r} is packed and has no gradient: gather Fisher information before packing")
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    flags = {name: w.requires_grad for name, w in weights.items()}
    try:
        for w in weights.values():
            w.requires_grad_(True)
        for example in examples:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(example), list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients):
                if gradient is not None:
                    sums[name] += gradient.float().square()
    finally:
        for name, w in weights.items():
            w.requires_grad_(flags[name])
    return sums
