"""What a layer was found to be, kept from call to call while none of what decided it has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.selection import Selection
from rankloom.ops.fused import Layer

Place = tuple[dict[str, Any], str, Tensor, bool]
"""A module's own table of parameters, a key in it, the tensor found there, and whether it was trained."""


class Known(NamedTuple):
    """A layer with its changes as the fused function takes it (`part`), and all that has to be as it was."""

    part: Layer
    cls: type
    selection: Selection
    dtype: torch.dtype
    device: torch.device
    casts: bool
    width: int
    version: int
    adapters: tuple[tuple[Adapter, int], ...]
    places: tuple[Place, ...]


def still(known: Known, layer: nn.Module, x: Tensor, casts: bool, selection: Selection) -> bool:
    """Whether `known` is what would be found again."""
    if known.selection is not selection or known.cls is not type(layer) or known.casts is not casts:
        return False
    if known.dtype is not x.dtype or known.device != x.device or known.width != x.shape[-1]:
        return False
    for table, key, tensor, trained in known.places:
        if table.get(key) is not tensor or tensor.requires_grad is not trained:
            return False
    for adapter, settings in known.adapters:
        own = adapter.__dict__
        if own.get("_settings", 0) != settings or own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return False
        if own["_backward_hooks"]:
            return False
    return known.version == known.places[0][2]._version and "_hf_hook" not in layer.__dict__


def known_as(
    part: Layer, layer: nn.Module, x: Tensor, casts: bool, selection: Selection, adapters: Sequence[Adapter]
) -> Known | None:
    """What there is to keep; None where the changes are computed anew in every call."""
    inside = [a for adapter in adapters for a in adapter.modules() if isinstance(a, Adapter)]
    if any(a._borrowed or a.hooked for a in inside):
        return None
    tables = [layer._parameters, *(module._parameters for a in adapters for module in a.modules())]
    found = {id(t): (table, key, t, t.requires_grad) for table in tables for key, t in table.items() if t is not None}
    places = [found[id(layer._parameters["weight"])]]
    wanted = [part.bias, part.gain, part.magnitude]
    for change in part.changes:
        wanted += change.A, change.B, change.inner, change.column
    for tensor in wanted:
        if tensor is not None:
            if id(tensor) not in found:
                return None
            places.append(found[id(tensor)])
    counts = tuple((a, int(a.__dict__.get("_settings", 0))) for a in inside)
    weight = places[0][2]
    return Known(
        part, type(layer), selection, x.dtype, x.device, casts, x.shape[-1], weight._version, counts, tuple(places)
    )
