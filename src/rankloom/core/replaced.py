"""Tensors of the base that others took the place of, so that they can be put back: the very same objects."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rankloom.core.graft import original_class, set_class
from rankloom.core.merging import holder, plain_class
from rankloom.core.slots import changed
from rankloom.store.bridges import bridge_of


class Replaced:
    """What `put` replaced, in order."""

    def __init__(self) -> None:
        self._tensors: list[tuple[nn.Module, str, Tensor | None]] = []
        self._classes: list[tuple[nn.Module, type[nn.Module]]] = []

    def put(self, layer: nn.Module, key: str, value: Tensor) -> None:
        """Let `value` be the layer's tensor `key`, frozen; the layer's class follows where a plain tensor needs one."""
        changed(layer)
        held = holder(layer, key)
        self._tensors.append((layer, key, held.get(key)))
        as_it_is = held is layer._buffers or isinstance(value, nn.Parameter)
        held[key] = value if as_it_is else nn.Parameter(value, requires_grad=False)
        plain = plain_class(layer, key)
        if plain is not None:
            self._classes.append((layer, original_class(layer)))
            set_class(layer, plain)

    def put_back(self) -> None:
        """Everything as it was before the first `put`; what is put back has come along to other devices and dtypes."""
        for layer, key, tensor in reversed(self._tensors):
            held = holder(layer, key)
            held[key] = _beside(tensor, held[key])
        for layer, original in reversed(self._classes):
            set_class(layer, original)
        normalise([layer for layer, _, _ in self._tensors])
        self._tensors, self._classes = [], []


def normalise(layers: Sequence[nn.Module]) -> None:
    """Have the parameters of adapted layers alone say what the base is."""
    for layer in layers:
        anchor = layer.__dict__.get("_rankloom")
        if anchor is not None and anchor.kind is not None:
            anchor.kind.normalise(layer)


def _beside(tensor: Tensor | None, here: Tensor | None) -> Tensor | None:
    """A kept tensor where, and in the dtype in which, the one that takes its place for now has come to be."""
    if tensor is None or here is None or (here.device, here.dtype) == (tensor.device, tensor.dtype):
        return tensor
    if bridge_of(tensor) is not None:
        return tensor if here.device == tensor.device else tensor.to(here.device)
    tensor.data = tensor.data.to(here.device, here.dtype)
    return tensor
