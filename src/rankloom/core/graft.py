"""Grafting: a layer's class is swapped for a generated subclass, so names, types and state-dict keys stay."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.forward import forward_of
from rankloom.core.kinds import Kind, repairs_of
from rankloom.core.packing import Stacks
from rankloom.core.selection import Selector
from rankloom.core.site import LAYER, SHARED
from rankloom.core.slots import Anchor, changed, flat_weights, moves, own_bias, parameter_property, slot_table
from rankloom.errors import StateError, TargetError


class Grafted(nn.Module):
    """Mixin in front of the original class in every generated class."""

    rankloom_original: type[nn.Module]
    rankloom_parameters: tuple[str, ...]
    rankloom_forward: Callable[..., Any]
    """The forward below the adapters."""
    rankloom_bias = staticmethod(own_bias)
    _rankloom: Anchor

    def _replicate_for_data_parallel(self) -> Any:
        raise StateError(
            f"nn.DataParallel copies layer {self._rankloom.name!r} to its devices without the adapters: train with one "
            "process for each (torchrun and DistributedDataParallel), or on one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        callable_ = self._rankloom.kind is not None
        return _rebuild, (self.rankloom_original, self.rankloom_parameters, callable_), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(original: type[nn.Module], parameters: tuple[str, ...], has_layer: bool) -> nn.Module:
    cls = _generated(original, parameters, has_layer)
    return cls.__new__(cls)


_classes: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[Grafted]] = {}


def _generated(original: type[nn.Module], parameters: tuple[str, ...], has_layer: bool) -> type[Grafted]:
    key = (original, parameters, has_layer)
    if key not in _classes:
        body: dict[str, Any] = {
            "__module__": original.__module__,
            "rankloom_original": original,
            "rankloom_parameters": parameters,
        }
        layered = {"weight", "bias"} if has_layer else set()
        for name in {*parameters, *layered}:
            body[name] = parameter_property(name, name in parameters, name in layered)
        if issubclass(original, nn.RNNBase):
            body["_flat_weights"] = flat_weights()
        below = (*repairs_of(original), original)
        body["rankloom_forward"] = next(cls.forward for cls in below if hasattr(cls, "forward"))
        body["forward"] = forward_of(body["rankloom_forward"], parameters)
        _classes[key] = type(f"Grafted{original.__name__}", (Grafted, *below), body)
    return _classes[key]


def add_adapter(
    layer: nn.Module, slot: str, name: str, adapter: Adapter, selector: Selector, path: str, kind: Kind
) -> None:
    """Put `adapter` into `slot` of `layer` under the adapter `name`, grafting the layer if it is not yet.

    Raises before the layer is touched.
    """
    _check_graftable(layer, path)
    if not isinstance(layer, Grafted):
        layer.__dict__["_rankloom"] = Anchor(selector, path)
        layer.add_module("adapters", nn.ModuleDict())
    anchor: Anchor = layer.__dict__["_rankloom"]
    if slot == LAYER:
        anchor.kind = kind
        kind.normalise(layer)
    slots: nn.ModuleDict = layer._modules["adapters"]  # type: ignore[assignment]
    if slot not in slots:
        slots[slot] = nn.ModuleDict()
    slots[slot].add_module(name, adapter)
    if slot == LAYER and moves(adapter, Base(kind, layer)):
        anchor.moving.add(name)
    _renew_class(layer)


def remove_adapter(layer: nn.Module, slot: str, name: str) -> None:
    """Take the adapter out; the last one gives the layer its own class back."""
    slots: nn.ModuleDict = layer._modules["adapters"]  # type: ignore[assignment]
    anchor: Anchor = layer.__dict__["_rankloom"]
    anchor.stacks = Stacks()
    changed(layer)
    anchor.moving.discard(name)
    _drop(slots, slot, name)
    if slot == LAYER and LAYER not in slots and anchor.kind is not None:
        anchor.kind.release(layer)
        anchor.kind = None
    if not any(name in slot_table(layer, s) for s in slots._modules if s != SHARED):
        _drop(slots, SHARED, name)
    if len(slots):
        _renew_class(layer)
        return
    del layer._modules["adapters"]
    original = type(layer).rankloom_original  # type: ignore[attr-defined]
    _rebind_instance_forward(layer, original)
    layer.__class__ = original
    del layer.__dict__["_rankloom"]
    if isinstance(layer, nn.RNNBase):
        layer._flat_weights = [layer._parameters[key] for key in layer._flat_weights_names]


def add_shared(layer: nn.Module, name: str, shared: nn.Module) -> None:
    """Register the shared tensors of the adapter `name` on its first layer."""
    slots: nn.ModuleDict = layer._modules["adapters"]  # type: ignore[assignment]
    if SHARED not in slots:
        slots[SHARED] = nn.ModuleDict()
    slots[SHARED].add_module(name, shared)


def _drop(slots: nn.ModuleDict, slot: str, name: str) -> None:
    table = slots._modules.get(slot)
    if table is None:
        return
    table._modules.pop(name, None)
    if not table._modules:
        del slots[slot]


def _check_graftable(layer: nn.Module, path: str) -> None:
    kind = type(layer)
    if isinstance(layer, Grafted):
        _check_class(layer)
    elif "adapters" in layer._modules or "adapters" in layer.__dict__ or hasattr(kind, "adapters"):
        raise TargetError(f"layer {path!r} ({kind.__name__}) already has an attribute 'adapters'")
    check_forward(layer, path)


def check_forward(layer: nn.Module, path: str) -> None:
    """Refuse a layer with a `forward` of its own, unless accelerate put it there: it would call past the adapters."""
    own_forward = layer.__dict__.get("forward")
    if own_forward is None or "_hf_hook" in layer.__dict__:
        return
    if getattr(own_forward, "__func__", None) is not type(layer).forward:
        raise TargetError(
            f"layer {path!r} ({type(layer).__name__}) carries its own forward ({own_forward!r}), which would hide the "
            "adapter: take that forward off before adapters are attached or detached"
        )


def _check_class(layer: Grafted) -> None:
    if "rankloom_original" not in vars(type(layer)):
        raise StateError(
            f"layer {layer._rankloom.name!r} was wrapped into {type(layer).__name__} after grafting; "
            "attach and detach adapters before sharding the model"
        )


def _renew_class(layer: nn.Module) -> None:
    if isinstance(layer, Grafted):
        _check_class(layer)
    original = original_class(layer)
    slots = layer._modules["adapters"]
    assert slots is not None
    parameters = tuple(sorted(s for s in slots._modules if s not in (LAYER, SHARED)))
    cls = _generated(original, parameters, LAYER in slots._modules)
    _rebind_instance_forward(layer, cls)
    layer.__class__ = cls


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer below its adapters."""
    return type(layer).rankloom_original if isinstance(layer, Grafted) else type(layer)


def set_class(layer: nn.Module, original: type[nn.Module]) -> None:
    """Give a layer another class, below its adapters if it has any."""
    if not isinstance(layer, Grafted):
        layer.__class__ = original
        return
    slots = layer._modules["adapters"]
    cls = _generated(original, type(layer).rankloom_parameters, slots is not None and LAYER in slots._modules)
    _rebind_instance_forward(layer, cls)
    layer.__class__ = cls


def _rebind_instance_forward(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Keep a per-instance `forward` (accelerate's offload hooks) in front of the new class's forward."""
    if "forward" not in layer.__dict__:
        return
    bound = types.MethodType(cls.forward, layer)
    if "_hf_hook" in layer.__dict__:
        layer.__dict__["_old_forward"] = bound
    else:
        layer.__dict__["forward"] = bound
