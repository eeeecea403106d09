"""bitsandbytes' 8-bit weights (`Int8Params` of LLM.int8()): W = codes · scale / 127, one scale for each row.

The first forward of a `Linear8bitLt` takes the scales out of the weight and into the layer's state.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from rankloom.errors import StateError


def read(weight: Any) -> Tensor:
    """The dense (out, in) weight, float32. Raises `StateError` where the layer has the scales."""
    return _decoded(weight, getattr(weight, "SCB", None))


def weight_of(layer: Any) -> Tensor:
    """`read` of a `Linear8bitLt`, wherever its scales are."""
    weight = layer._parameters["weight"]
    scales = getattr(weight, "SCB", None)
    return _decoded(weight, layer.state.SCB if scales is None else scales)


def repack(like: Any, weight: Tensor) -> Tensor:
    """`weight` quantised by bitsandbytes itself, which does it in float16."""
    made: Tensor = type(like)(
        weight.detach().cpu().contiguous(), requires_grad=False, has_fp16_weights=like.has_fp16_weights
    ).to(like.device)
    return made


def stored(weight: Any) -> list[Tensor]:
    """Codes, and the scales where the weight has them."""
    return [weight.data] + ([] if weight.SCB is None else [weight.SCB])


def beside(layer: nn.Module) -> list[Tensor]:
    """The scales that a forward has moved from the weight of a `Linear8bitLt` into its state."""
    scales = getattr(getattr(layer, "state", None), "SCB", None)
    moved = getattr(layer._parameters.get("weight"), "SCB", layer) is None
    return [scales] if moved and isinstance(scales, Tensor) else []


def normalise(layer: Any) -> None:
    """Codes and scales with the weight, as before the first forward: the weight alone says what it is."""
    weight, state = layer._parameters["weight"], layer.state
    if type(weight) is nn.Parameter and not weight.is_floating_point():
        scales = getattr(weight, "SCB", None)
        weight = layer._parameters["weight"] = _named_again(weight, state.SCB if scales is None else scales)
    if getattr(weight, "SCB", weight) is None and state.SCB is not None:
        weight.CB, weight.SCB = weight.data, state.SCB
    state.reset_grads()


def _named_again(weight: nn.Parameter, scales: Tensor) -> Any:
    """The Int8Params that `weight` was before pickling made a plain parameter of it."""
    make = sys.modules["bitsandbytes.nn.modules"].Int8Params
    return make(weight.data, requires_grad=False, has_fp16_weights=False, CB=weight.data, SCB=scales)


def _decoded(weight: Tensor, scales: Tensor | None) -> Tensor:
    if weight.dtype.is_floating_point:
        return weight.detach().as_subclass(Tensor)  # has_fp16_weights, or not packed yet
    if scales is None:
        raise StateError(
            f"an Int8Params of {tuple(weight.shape)} has no scales: a forward moved them into its layer; read the "
            "layer through its kind (core.kinds.kind_of(layer).weight(layer))"
        )
    return weight.data.float() * (scales.float()[:, None] * (1 / 127))
