"""Whether a layer is what its kind says: a product with its own matrix, and nothing more.

A class derived from `nn.Linear` may scale, route or standardise in a forward of its own. A change beside its output
would then be another one than the change of its weight. What such a forward does is seen by calling it once.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rankloom.core.graft import original_class
from rankloom.core.kinds import Kind, is_kind
from rankloom.store.bridges import bridge_of

CLOSE, ROUGH = 1e-3, 5e-2
"""Largest difference to the product, relative to it: with weights of 32 bits and more, and with fewer."""


_seen: WeakKeyDictionary[nn.Module, tuple[object, bool]] = WeakKeyDictionary()
"""What calling a layer has shown, for its class and weight."""


def own_weight(layer: nn.Module) -> bool:
    """Whether `weight` is a parameter of the layer itself: a parametrised or scripted one has none."""
    return "weight" in layer._parameters and not isinstance(layer, torch.jit.ScriptModule)


def faithful(layer: nn.Module, kind: Kind) -> bool:
    """Whether the layer's forward is its kind's product with its weight, plus its bias."""
    cls: Any = original_class(layer)
    if plain_class(cls):
        return True
    weight = kind.tensor(layer)
    now = (cls, id(weight), 0 if weight.is_inference() else weight._version)
    if _seen.get(layer, (None, False))[0] != now:
        _seen[layer] = now, _same_product(layer, kind, cls)
    return _seen[layer][1]


@cache
def plain_class(cls: type) -> bool:
    """Whether layers of this class run the forward of a class that a kind is known for."""
    definer = next((base for base in cls.__mro__ if "forward" in vars(base)), None)
    return definer is not None and is_kind(definer)


def _same_product(layer: nn.Module, kind: Kind, cls: Any) -> bool:
    weight = kind.tensor(layer)
    wide = weight.dtype if weight.is_floating_point() and bridge_of(weight) is None else torch.float32
    x = kind.example(layer, wide, weight.device)
    try:
        with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            given = cls.forward(layer, x)
            product = kind.apply(layer, x, kind.matrix(layer).to(wide))
            bias = kind.bias(layer)
            right = product if bias is None else product + kind.shift(product, bias.to(product.dtype))
    except Exception:  # a forward that takes or gives something else
        return False
    if not isinstance(given, Tensor) or given.shape != right.shape:
        return False
    if given.is_meta:
        return True  # nothing to compare: its class and shapes speak for it
    near = CLOSE if wide.itemsize >= 4 and bridge_of(weight) is None else ROUGH
    return bool((given.to(right.dtype) - right).abs().max() <= near * right.abs().max().clamp_min(1e-30))


def computed_weight(layer: nn.Module) -> str:
    """How a layer without a weight of its own comes by it, with what gives it one; "" for every other layer."""
    if parametrize.is_parametrized(layer, "weight"):
        return "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
    old = {"weight_g": "torch.nn.utils.remove_weight_norm(layer)", "weight_orig": _remover(layer)}
    return next((remedy for key, remedy in old.items() if key in layer._parameters), "")


def _remover(layer: nn.Module) -> str:
    pruned = "weight_mask" in layer._buffers
    return "torch.nn.utils." + ("prune.remove(layer, 'weight')" if pruned else "remove_spectral_norm(layer)")
