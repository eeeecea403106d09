"""What adapters say to the tensors of a layer, and what those become; nothing here is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core import thin as forms
from rankloom.core.journal import Delta, Edit, Into, Pair, Term, Value, keys_of
from rankloom.core.kinds import Bare, Kind, kind_of
from rankloom.core.site import LAYER, Site
from rankloom.core.targets import base_tensors
from rankloom.errors import NotMergeable, StateError, TargetError
from rankloom.store.base import Packed, dense
from rankloom.store.bridges import bridge_of


def check_in_memory(layer: nn.Module, name: str) -> None:
    """Refuse a layer whose weights an offload hook keeps elsewhere."""
    if getattr(layer.__dict__.get("_hf_hook"), "offload", False):
        raise StateError(f"{name!r} is offloaded: load the model without offloading to merge into it")


def edits(parts: list[tuple[Site, float]], into: Into) -> Iterator[Edit]:
    """The changes of one layer's adapters with their weights, by tensor: those of the layer before bare parameters.

    Raises `NotMergeable` for a change without a matrix, or of a bias that the layer has not.
    """
    path = parts[0][0].path
    terms: dict[str, list[Term]] = {}
    changed: set[str] = set()
    for site, weight in sorted(parts, key=lambda part: part[0].slot != LAYER):
        key = site.kind.parameter()
        terms.setdefault(site.slot, []).append(_term(site, weight, first=key not in changed))
        changed.add(key)
        shift = site.adapter.delta_bias(site.base) if site.slot == LAYER else None
        if shift is not None:
            _check_bias(site)
            terms.setdefault("bias", []).append(Delta(weight, shift))
            changed.add("bias")
    for slot, found in terms.items():
        alone = into == "store" and len(parts) == 1 and slot == parts[0][0].slot
        yield Edit(path, slot, tuple(found), _without_loss(*parts[0]) if alone else {})


def edited(layer: nn.Module, edit: Edit, now: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The new value, dense, of the tensor that the edit changes. Half-precision is added up in float32.

    `now`: what an earlier edit of the same tensor made of it; `dtype`: of what replaces a weight that has none of its
    own.
    """
    kind = kind_at(layer, edit.slot)
    old = holder(layer, kind.parameter()).get(kind.parameter())
    like = _weight(layer) if old is None else old
    if now is not None:
        matrix = now
    elif old is None:
        matrix = torch.zeros_like(next(edit.tensors())[1], device=like.device)
    else:
        matrix = like if edit.terms[0].replaces else kind.matrix(layer)
    wide = matrix.float() if matrix.is_floating_point() and matrix.element_size() <= 2 else matrix
    for term in edit.terms:
        wide = term.added(wide)
    value = wide if old is None else kind.to_weight(layer, wide)
    plain = like.is_floating_point() or bridge_of(like) is None
    return value.to(like.dtype if plain else dtype or matrix.dtype)


def repacked(layer: nn.Module, edit: Edit, value: Tensor) -> tuple[Tensor, float | None]:
    """The new value in the store of the old one, and the part of the change that this lost; a dense one as it is."""
    old = layer._parameters.get(kind_at(layer, edit.slot).parameter())
    bridge = None if old is None else bridge_of(old)
    if old is None or (bridge is None and not isinstance(old, Packed)):
        return value, None
    if isinstance(old, Packed):
        parts = {name: part.to(old.device) for name, part in edit.parts.items()}
        made = Packed({**old.parts, **parts}, old.store, old.shape, old.dtype) if parts else old.repack(value)
    else:
        assert bridge is not None
        made = bridge.repack(old, value)  # type: ignore[assignment]
    change = torch.linalg.vector_norm(value - kind_at(layer, edit.slot).weight(layer)).clamp_min(1e-38)
    return made, float(torch.linalg.vector_norm(dense(made) - value) / change)


def check_fits(model: nn.Module, rows: list[dict[str, Any]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a journal whose sites this model has not, or whose tensors have other `shapes`, by key, than it needs.

    Raises `TargetError` naming site and shape, `KeyError`, `TypeError` or `ValueError` where the rows are no journal's.
    """
    for key, edit, kind, name in keys_of(rows):
        shape = tuple(shapes[key])
        wanted = _shape(model, edit, kind, name, shapes, key)
        if wanted is not None and shape != wanted:
            raise TargetError(
                f"the journal's {name!r} of {edit.name!r} has shape {shape}, and this model needs {wanted}: it was "
                "made on another base"
            )


def _shape(
    model: nn.Module, edit: Edit, kind: str, name: str, shapes: Mapping[str, Sequence[int]], key: str
) -> tuple[int, ...] | None:
    try:
        layer = model.get_submodule(edit.path)
        at = kind_at(layer, edit.slot)
        old = holder(layer, at.parameter()).get(at.parameter())
    except (AttributeError, StateError) as error:
        raise TargetError(f"the journal changes {edit.name!r}, which this model has not") from error
    if kind == "part":
        part = old.parts.get(name) if isinstance(old, Packed) else None
        return None if part is None else tuple(part.shape)
    if old is None:
        own = kind_of(layer)
        if own is None or edit.slot not in layer._parameters:
            raise TargetError(f"the journal changes {edit.name!r}, which this model has not")
        return own.shape(layer)[-2:-1]
    if kind == "value":
        return tuple(old.shape)
    whole = at.shape(layer)
    if kind == "delta" or len(whole) < 2:
        return whole
    rank = tuple(shapes[f"{key.rpartition('.')[0]}.A"])[-2:-1]
    return (*whole[:-2], *rank, whole[-1]) if name == "A" else (*whole[:-1], *rank)


def kind_at(layer: nn.Module, slot: str) -> Kind:
    """The kind that reads and writes a slot of `layer`, adapted or not."""
    if slot != LAYER:
        return Bare(slot)
    anchor = layer.__dict__.get("_rankloom")
    kind = kind_of(layer) if anchor is None or anchor.kind is None else anchor.kind
    if kind is None:
        raise StateError(f"a {type(layer).__name__} has no matrix that a change could be added to")
    return kind


def holder(layer: nn.Module, key: str) -> dict[str, Tensor | None]:
    """The layer's own table that has, or is to have, the tensor `key`: past any property of the same name."""
    return layer._buffers if key in layer._buffers else layer._parameters  # type: ignore[return-value]


def plain_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first base parameter that is kept as plain numbers."""
    own = (value for _, _, _, value in base_tensors(model) if value.is_floating_point() and bridge_of(value) is None)
    return next((value.dtype for value in own), None)


def plain_class(layer: nn.Module, key: str) -> type[nn.Module] | None:
    """The class that the layer needs for the plain parameter `key` that it now has; None: its own."""
    anchor = layer.__dict__.get("_rankloom")
    kind = kind_of(layer) if anchor is None else anchor.kind
    value = layer._parameters.get(key)
    if kind is None or kind.parameter() != key or value is None or bridge_of(value) is not None:
        return None
    plain: type[nn.Module] | None = kind.plain(layer)
    return plain


def _term(site: Site, weight: float, first: bool) -> Term:
    adapter, base = site.adapter, site.base
    value = adapter.whole() if first and weight == 1 else None
    if value is not None:
        return Value(1.0, value)
    thin = adapter.thin(base, None)
    if thin is None or thin.magnitude is not None:
        return Delta(weight, adapter.delta(base))
    a, b = forms.factors(thin)
    return Pair(weight * thin.scale, a, b)


def _without_loss(site: Site, weight: float) -> dict[str, Tensor]:
    """The parts that change where the adapter's change fits the store of the packed weight."""
    old, made = site.kind.tensor(site.layer), site.adapter.repacked(site.base, weight)
    if not isinstance(old, Packed) or not isinstance(made, Packed):
        return {}
    before = old.parts
    return {name: part for name, part in made.parts.items() if part is not before[name]}


def _weight(layer: nn.Module) -> Tensor:
    kind = kind_of(layer)
    if kind is None:
        raise StateError(f"a {type(layer).__name__} has no matrix beside the parameter that is missing")
    return kind.tensor(layer)


def _check_bias(site: Site) -> None:
    if "bias" not in site.layer._parameters:
        raise NotMergeable(
            f"{type(site.adapter).__name__} at {site.name!r} changes the bias, and a "
            f"{site.kind.name} layer has none to merge it into"
        )
