"""What a layer's tensors become when its adapters' changes are added to them; nothing here is written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rankloom.core import thin as forms
from rankloom.core.site import LAYER, Site
from rankloom.core.targets import base_tensors
from rankloom.errors import NotMergeable, StateError
from rankloom.store.base import Packed, dense
from rankloom.store.bridges import bridge_of


def check_in_memory(site: Site) -> None:
    """Refuse a layer whose weights an offload hook keeps elsewhere."""
    if getattr(site.layer.__dict__.get("_hf_hook"), "offload", False):
        raise StateError(f"{site.name!r} is offloaded: load the model without offloading to merge into it")


def folded(
    parts: list[tuple[Site, float]], dtype: torch.dtype | None = None
) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The new tensors of one layer, whose adapters with their weights are given: (layer, parameter name, value).

    Changes of one tensor add up. `dtype`: of what replaces a weight that has none of its own. Nothing is written.
    """
    first = parts[0][0]
    layer, kind = first.layer, first.kind
    new: dict[str, Tensor] = {}
    inside: list[tuple[Site, float]] = []
    bare: list[tuple[Site, float]] = []
    for part in parts:
        (inside if part[0].slot == LAYER else bare).append(part)
    if inside:
        new[kind.parameter()] = kind.to_weight(layer, _changed_matrix(inside))
        _add_shifts(new, inside)
    for site, weight in bare:
        slot, old = site.slot, site.kind.tensor(layer)
        new[slot] = site.adapter.add(new.get(slot, old), None, old, site.base, weight)
    slots = {site.slot for site, _ in bare}
    for key, value in new.items():
        now = holder(layer, key).get(key)
        like = kind.tensor(layer) if now is None else now
        wanted = like.dtype if like.is_floating_point() else dtype or kind.weight(layer).dtype
        if key in slots or value.dtype != wanted:
            value = value.to(wanted, copy=True)
        yield layer, key, value


def repacked(
    parts: list[tuple[Site, float]], entry: tuple[nn.Module, str, Tensor], lost: dict[str, float]
) -> tuple[nn.Module, str, Tensor]:
    """The new value in the store of the old one, where that is packed; what it lost goes to `lost`."""
    layer, key, value = entry
    old = layer._parameters.get(key)
    bridge = None if old is None else bridge_of(old)
    if old is None or (bridge is None and not isinstance(old, Packed)):
        return entry
    (site, weight), *others = parts
    made = site.adapter.repacked(site.base, weight) if not others and site.kind.parameter() == key else None
    if made is None:
        made = old.repack(value) if isinstance(old, Packed) else bridge.repack(old, value)  # type: ignore[union-attr]
    change = torch.linalg.vector_norm(value - site.kind.weight(layer)).clamp_min(1e-38)
    lost[site.name] = float(torch.linalg.vector_norm(dense(made) - value) / change)
    return layer, key, made


def _changed_matrix(parts: list[tuple[Site, float]]) -> Tensor:
    """A layer's matrix (out, in) with every change added, in float32 at least: one pass for each thin change."""
    base = parts[0][0].base
    matrix = base.matrix()
    matrix = matrix if matrix.element_size() > 2 else matrix.float()
    for site, weight in parts:
        thin = site.adapter.thin(base, None)
        if thin is None or thin.magnitude is not None:
            matrix = torch.add(matrix, site.adapter.delta(base).to(matrix), alpha=weight)
        else:
            a, b = forms.factors(thin)
            matrix = torch.addmm(matrix, b.to(matrix), a.to(matrix), alpha=weight * thin.scale)
    return matrix


def _add_shifts(new: dict[str, Tensor], parts: list[tuple[Site, float]]) -> None:
    """Add the changes of a layer's bias to the values that are to be written."""
    for site, weight in parts:
        layer, shift = site.layer, site.adapter.delta_bias(site.base)
        if shift is None:
            continue
        if "bias" not in layer._parameters:
            raise NotMergeable(
                f"{type(site.adapter).__name__} at {site.name!r} changes the bias, and a "
                f"{site.kind.name} layer has none to merge it into"
            )
        bias = new.get("bias", layer._parameters.get("bias"))
        new["bias"] = weight * shift if bias is None else bias + weight * shift


def holder(layer: nn.Module, key: str) -> dict[str, Tensor | None]:
    """The layer's own table that has, or is to have, the tensor `key`: past any property of the same name."""
    return layer._buffers if key in layer._buffers else layer._parameters  # type: ignore[return-value]


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first base parameter that is kept as plain numbers."""
    own = (value for _, _, _, value in base_tensors(model) if value.is_floating_point() and bridge_of(value) is None)
    return next((value.dtype for value in own), None)


def plain_class(layer: nn.Module, key: str) -> type[nn.Module] | None:
    """The class that the layer needs for the plain parameter `key` that it now has; None: its own."""
    kind = layer.__dict__["_rankloom"].kind
    value = layer._parameters.get(key)
    if kind is None or kind.parameter() != key or value is None or bridge_of(value) is not None:
        return None
    plain: type[nn.Module] | None = kind.plain(layer)
    return plain
