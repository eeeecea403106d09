"""Methods on stores: the contract, over models whose weights are packed.

One method of each family on any store keeps what is quick and could break there; on NF4, the store of QLoRA, everything
that takes no compiler, and every method the quickest. Each store compiles. bitsandbytes' 4 bits stand for bases that another library packed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from contract_models import IMAGES, POINTS, WORDS, block_model, call, conv_net, pair
from test_contract import ALONE, COMPILER, CONVOLUTIONAL, FAMILIES, IN_BLOCKS, TARGETS
from test_contract import METHODS as EVERY
from torch import nn

from rankloom.core.kinds import kind_of
from rankloom.store.base import Packed, Store
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.model import keep
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform
from rankloom.testing import Check, checks

METHODS = {name: plan for name, plan in EVERY.items() if plan.store is None}
"""Those that bring no store of their own."""
ALIKE = [name for name in METHODS if name in FAMILIES or name in CONVOLUTIONAL]
OTHERS = [name for name in METHODS if name not in ALIKE]
STORES: dict[str, Store] = {
    "nf4": NormalFloat(),
    "int3": Uniform(3, 12),
    "mxint4": BlockFloat(4, 16),
    "nested": NestedFloat(3, 4, "float16", 16, 16),
}
ON_EVERY = ("merge", "unmerge", "fold", "checkpointing", "save_load", "copies", "bf16")
ON_NF4 = (
    "identity", "base_only", "base", "detach", "independence", "delta", "frozen", "gradients", "resume", "pickles", "moves",
    "autocast", "adds", "weights", "switching", "rows", "rows_tensor", "threads",
)  # fmt: skip
ON_BITSANDBYTES = (
    "identity", "base_only", "base", "detach", "independence", "delta", "merge", "unmerge", "fold", "gradients",
    "checkpointing", "resume", "save_load", "copies", "pickles", "bf16", "autocast", "switching", "rows",
)  # fmt: skip
QUICK = ("delta", "merge", "save_load")
FOREIGN = ("adalora", "dora", "lora", "vera")


def packed(make: Callable[[], nn.Module], store: Store) -> Callable[[], nn.Module]:
    """The model of `make` with every linear layer and every wide kernel but the head in `store`."""

    def build() -> nn.Module:
        model = make()
        named = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and n != "lm_head"}
        chosen = {f"{n}.weight": store for n, m in named.items() if m.weight[0].numel() > 6}
        assert chosen
        keep(model, chosen)
        return model

    return build


@cache
def on_store(method: str, store: str) -> dict[str, Check]:
    plan, kept = METHODS[method], STORES[store]
    if method in CONVOLUTIONAL:
        kept = Uniform(3, 3) if isinstance(kept, Uniform) else kept
        found = checks(plan, packed(conv_net, kept), call, IMAGES, target_modules=["conv1", "conv2", "conv3"])
    else:
        found = checks(plan, packed(block_model, kept), call, WORDS, target_modules=TARGETS)
    return {check.name: check for check in found}


def four_bit() -> nn.Module:
    import bitsandbytes as bnb

    model = block_model()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(layer.weight.detach(), quant_type="nf4", module=new)
            new.bias = layer.bias
            new.support_avx512bf16_for_cpu = False  # where a CPU has that, bitsandbytes fails on layers so small
            model.set_submodule(name, new.to("cpu"))
    return model


@cache
def on_bitsandbytes(method: str) -> dict[str, Check]:
    return {c.name: c for c in checks(METHODS[method], four_bit, call, WORDS, target_modules=TARGETS)}


def _all(methods: Any, others: Any, names: Any) -> list[Any]:
    return [pytest.param(m, o, n, id=f"{m}-{o}-{n}") for m in methods for o in others for n in names]


@pytest.mark.parametrize(
    ("method", "store", "name"),
    _all(ALIKE, STORES, ON_EVERY) + _all(ALIKE, ["nf4"], ON_NF4) + _all(OTHERS, ["nf4"], QUICK),
)
def test_contract_on_store(method: str, store: str, name: str) -> None:
    if method in IN_BLOCKS and name in ALONE:
        pytest.skip("its routers look at the module around a layer")
    on_store(method, store)[name]()


@pytest.mark.parametrize("store", STORES)
def test_compiled_on_store(store: str) -> None:
    made = packed(pair, STORES[store])
    assert isinstance(made().q_proj.weight, Packed)
    found = {c.name: c for c in checks(METHODS["lora"], made, call, POINTS, target_modules=["q_proj", "down_proj"])}
    for name in COMPILER if store == "nf4" else ("compile",):
        found[name]()


@pytest.mark.parametrize(("method", "name"), [(m, n) for m in FOREIGN for n in ON_BITSANDBYTES])
def test_contract_on_bitsandbytes(method: str, name: str) -> None:
    pytest.importorskip("bitsandbytes")
    assert type(kind_of(four_bit().layers[0].q_proj)).__name__ == "FourBit"
    on_bitsandbytes(method)[name]()
