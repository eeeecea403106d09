"""What a store costs beside a dense layer and beside bitsandbytes and torchao: CPU time and peak bytes, as ratios.

OMP_NUM_THREADS=1 python bench/stores.py        writes bench/results/stores.json

One layer of 1024 × 1024 in float32, 64 rows of input. `encode` is beside bitsandbytes' NF4; `decode`, `forward` and
`train` (forward and backward to the input) beside the dense layer's forward (and forward with backward). `bits`: held
for a weight. `peak`: bytes alive at most during `train`, beside the dense weight's, what was there before left out.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _measure import RESULTS, interleaved, ratios
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from rankloom.core.kinds import kind_of
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.footprint import footprint
from rankloom.store.gptq import pack_gptq
from rankloom.store.model import keep
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

SIZE, ROWS = 1024, 64
STORES = {
    "nf4, double": NormalFloat(),
    "nf4": NormalFloat(double=False),
    "nf2, double": NormalFloat(2),
    "uniform 4": Uniform(4, 32),
    "uniform 3": Uniform(3, 32),
    "block float 4": BlockFloat(4, 16),
    "nested float 3": NestedFloat(3, 4, "bfloat16"),
}
BNB = "bitsandbytes nf4"


class Peak(TorchDispatchMode):
    """Bytes of the storages made inside the block: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {self._key(t) for t in tree_leaves((args, kwargs)) if self._counts(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if self._counts(t) and self._key(t) not in before:
                storage = t.untyped_storage()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size

    @staticmethod
    def _counts(t: Any) -> bool:
        return isinstance(t, Tensor) and not is_traceable_wrapper_subclass(t)

    @staticmethod
    def _key(t: Tensor) -> int:
        return t.untyped_storage()._cdata


def dense_layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)


def ours(store: Any) -> nn.Module:
    layer = dense_layer()
    keep(layer, {"weight": store})
    return layer


def bitsandbytes_layer(cls: str) -> nn.Module:
    import bitsandbytes as bnb

    weight = dense_layer().weight
    if cls == "Linear8bitLt":
        layer = bnb.nn.Linear8bitLt(SIZE, SIZE, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight.data, requires_grad=False)
    else:
        layer = bnb.nn.Linear4bit(SIZE, SIZE, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight.data, quant_type="nf4", module=layer)
    return layer.to("cpu")


def torchao_layer() -> nn.Module:
    import torchao.quantization as q

    holder = nn.Sequential(dense_layer())
    q.quantize_(holder, q.Int8WeightOnlyConfig())
    return holder[0]


def layers() -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {"dense": dense_layer()} | {name: ours(store) for name, store in STORES.items()}
    made[BNB] = bitsandbytes_layer("Linear4bit")
    made["bitsandbytes int8"] = bitsandbytes_layer("Linear8bitLt")
    if find_spec("torchao") is None:
        print("torchao is not installed, and left out: pip install 'rankloom[ao]'")
    else:
        made["torchao int8"] = torchao_layer()
    return made


def encoders() -> dict[str, Callable[[], object]]:
    import bitsandbytes.functional as bnb

    weight, x = dense_layer().weight.detach(), torch.randn(4 * SIZE, SIZE)
    hessian = x.T @ x
    made: dict[str, Callable[[], object]] = {n: (lambda s=s: s.encode(weight)) for n, s in STORES.items()}
    made["uniform 4, gptq"] = lambda: pack_gptq(weight, Uniform(4, 32), hessian)
    made[BNB] = lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return made


def train(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()
    x.grad = None


def peak(layer: nn.Module, x: Tensor) -> int:
    with Peak() as seen:
        train(layer, x)
    return seen.most


def main() -> None:
    torch.set_num_threads(1)
    every = {name: layer.train() for name, layer in layers().items()}
    x, asking = torch.randn(ROWS, SIZE), torch.randn(ROWS, SIZE, requires_grad=True)

    @torch.no_grad()
    def forward(layer: nn.Module) -> None:
        layer(x)

    @torch.no_grad()
    def decode(layer: nn.Module) -> None:
        kind_of(layer).weight(layer)

    forwards = interleaved({n: (lambda m=m: forward(m)) for n, m in every.items()})
    decodes = interleaved(
        {n: (lambda m=m: decode(m)) for n, m in every.items() if n != "dense"}
        | {"dense": lambda: forward(every["dense"])}
    )
    trains = interleaved({n: (lambda m=m: train(m, asking)) for n, m in every.items()})
    encodes = ratios(interleaved(encoders(), 3), BNB)
    table = {"decode": ratios(decodes, "dense"), "forward": ratios(forwards, "dense"), "train": ratios(trains, "dense")}
    peaks = {n: peak(m, asking) / (4 * SIZE * SIZE) for n, m in every.items()}
    rows: dict[str, dict[str, float]] = {}
    for name in [*every, "uniform 4, gptq"]:
        row = {"encode": encodes[name]} if name in encodes else {}
        if name in every:
            row |= {what: found[name] for what, found in table.items() if (what, name) != ("decode", "dense")}
            row |= {"bits": footprint(every[name].modules()).total.bits_per_weight, "peak": peaks[name]}
        rows[name] = {what: float(f"{value:.3g}") for what, value in row.items()}
    columns = ("bits", "encode", "decode", "forward", "train", "peak")
    print(f"{'':20}" + "".join(f"{c:>10}" for c in columns))
    for name, row in rows.items():
        print(f"{name:20}" + "".join(f"{row[c]:>10g}" if c in row else f"{'–':>10}" for c in columns))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "stores.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
