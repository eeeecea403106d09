"""GPTQ: the codes of `Uniform` chosen for what a layer really gets to see (arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.errors import TargetError
from rankloom.ops.affine import gptq
from rankloom.ops.unpack import pack
from rankloom.store.base import Packed
from rankloom.store.calibrate import hessians
from rankloom.store.model import Saving, keep_with
from rankloom.store.uniform import Uniform

DAMP = 0.01


def pack_gptq(weight: Tensor, store: Uniform, hessian: Tensor, damp: float = DAMP) -> Packed:
    """`weight` (out, in) in `store`, rounded by GPTQ: the parts are those of `Uniform`, and so is all that follows."""
    found = gptq(weight.detach(), hessian, store.bits, store.group, damp)
    codes = pack(found.codes.flatten().to(torch.uint8), store.bits)
    return Packed({"codes": codes, "scale": found.scale, "zero": found.zero}, store, weight.shape, weight.dtype)


def keep_gptq(
    model: nn.Module,
    stores: Mapping[str, Uniform],
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    damp: float = DAMP,
    sequential: bool = True,
) -> Saving:
    """`store.model.keep` for weights of linear layers, rounded by GPTQ on what `run(batch)` brings each layer.

    `stores`: by weight name, in the order of the layers; `sequential`: every layer sees what the rounded layers before
    it give, at the cost of a pass over `batches` for each; otherwise one pass for all. Raises `TargetError`,
    `UnreachedError` before the weights that they are about are packed.
    """
    layers = {name: _layer(model, name) for name in stores}
    batches = list(batches)
    stages = [[name] for name in stores] if sequential else [list(stores)]
    savings = []
    for stage in stages:
        found = hessians({name: layers[name] for name in stage}, batches, run)
        packers = {n: partial(pack_gptq, store=stores[n], hessian=found[n], damp=damp) for n in stage}
        savings.append(keep_with(model, packers))
    weights, before, after = (sum(getattr(s, key) for s in savings) for key in ("weights", "before", "after"))
    return Saving(weights, before, after, savings[-1].left)


def _layer(model: nn.Module, name: str) -> nn.Module:
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if leaf != "weight" or not isinstance(layer, nn.Linear):
        raise TargetError(f"{name!r} is no weight of a linear layer: keep it with a plain Uniform, or leave it out")
    return layer
