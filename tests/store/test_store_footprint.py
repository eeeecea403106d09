"""The table of what weights take: by hand for our stores, other libraries and plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom.core.attach import detach
from rankloom.store.calibrate import fisher
from rankloom.store.footprint import footprint
from rankloom.store.mixed import candidates, mix
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform


def test_by_hand():
    model = nn.ModuleDict({n: nn.Linear(128, 64, bias=n == "a") for n in "abcd"})
    model["d"].weight = model["c"].weight
    keep(model, {"a.weight": NormalFloat(double=False), "b.weight": Uniform(4, 32), "c.weight": Uniform(4, 32)})
    found = {row.how: row for row in footprint(model.modules()).rows}
    nf4 = found[str(NormalFloat(double=False))]
    assert (nf4.tensors, nf4.weights, nf4.bytes) == (1, 8192, 8192 // 2 + 128 * 4)
    assert nf4.bits_per_weight == 4.5
    assert nf4.ratio == 4.5 / 16
    uniform = found[str(Uniform(4, 32))]
    assert (uniform.tensors, uniform.weights, uniform.bits_per_weight) == (2, 2 * 8192, 6.0)
    assert (found["float32"].tensors, found["float32"].weights, found["float32"].ratio) == (1, 64, 2.0)
    total = footprint(model.modules()).total
    assert (total.tensors, total.weights) == (4, 3 * 8192 + 64)
    assert total.bytes == sum(row.bytes for row in found.values())
    shown = str(footprint(model.modules()))
    assert "NormalFloat(bits=4" in shown
    assert "24,640" in shown
    assert "4.500" in shown
    assert len(shown.splitlines()) == 5


def test_other_libraries():
    bnb = pytest.importorskip("bitsandbytes")
    four = bnb.nn.Linear4bit(256, 64, bias=False, quant_type="nf4")
    four.weight = bnb.nn.Params4bit(torch.randn(64, 256), quant_type="nf4", module=four)
    eight = bnb.nn.Linear8bitLt(256, 64, bias=False, has_fp16_weights=False)
    eight.weight = bnb.nn.Int8Params(torch.randn(64, 256), requires_grad=False)
    model = nn.ModuleDict({"four": four, "eight": eight}).to("cpu")
    for _ in range(2):
        found = {row.how: row for row in footprint(model.modules()).rows}
        assert found["bitsandbytes Params4bit"].weights == found["bitsandbytes Int8Params"].weights == 64 * 256
        assert found["bitsandbytes Params4bit"].bytes == 64 * 128 + 64 * 4 + 1 * 4 + 4
        assert found["bitsandbytes Int8Params"].bytes == 64 * 256 + 64 * 4
        model["eight"](torch.randn(2, 256))


@pytest.mark.parametrize("solver", ["lagrange", "milp"])
def test_mixed_end_to_end(solver):
    """Fisher information of a small model → a store for each matrix → packed: measured bits within the budget, loss below
    one store of the same size, and how far from the optimum the choice may be.
    """
    if solver == "milp":
        pytest.importorskip("scipy")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    with torch.no_grad():
        model[2].weight.mul_(0.02)
    data, labels = torch.randn(96, 64), torch.randint(10, (96,))
    loss = lambda i: nn.functional.cross_entropy(model(data[i]), labels[i])  # noqa: E731
    names = ["0.weight", "2.weight", "4.weight"]
    weights = {name: model.get_parameter(name) for name in names}
    known = fisher(weights, [slice(i, i + 1) for i in range(64)], loss)
    stores = candidates(scale_bits=(8,), scale_dtypes=("float32",), blocks=(16, 64), double_blocks=(256,))
    found = mix(weights, 3.2, stores, fisher=known, solver=solver)
    assert found.stores.keys() == set(names)
    assert 0 <= found.allocation.gap < (1e-6 if solver == "milp" else 0.2)
    bits = {name: store.bits for name, store in found.stores.items()}
    assert bits["2.weight"] < max(bits["0.weight"], bits["4.weight"])
    before = model(data).detach()
    saving = keep(model, found.stores)
    assert saving.bits_per_weight <= 3.2 * 1.05
    measured = footprint(model.modules())
    kept = [row for row in measured.rows if row.how.startswith("NestedFloat")]
    assert sum(r.weights for r in kept) == sum(w.numel() for w in weights.values())
    assert 8 * sum(r.bytes for r in kept) / sum(r.weights for r in kept) == pytest.approx(found.bits, rel=0.05)
    single = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    single.load_state_dict({k: weights.get(k, v) for k, v in model.state_dict().items()})
    keep(single, dict.fromkeys(names, NormalFloat(3)))
    assert (model(data) - before).norm() < (single(data) - before).norm()
    bank = rl.attach(model, rl.LoRA(r=2))
    assert footprint(model.modules()).total.weights == measured.total.weights + sum(
        p.numel() for _, p, _ in bank.trainable()
    )
    detach(model)
