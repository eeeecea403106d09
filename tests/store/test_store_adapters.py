"""Any method on a packed base: identity, gradient, merge into 16 bits, no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankloom as rl
from rankloom.methods.adalora import AdaLoRA
from rankloom.methods.dylora import DyLoRA
from rankloom.methods.qalora import QALoRA
from rankloom.methods.vera import VeRA
from rankloom.store import dense
from rankloom.store.base import Packed
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.model import keep, unpack
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

METHODS = {
    "lora": rl.LoRA(r=4),
    "dora": rl.DoRA(rl.LoRA(r=4)),
    "vera": VeRA(r=8),
    "adalora": AdaLoRA(init_r=4, target_r=2),
    "pissa": rl.LoRA(r=4, init_lora_weights="pissa"),
    "dylora": DyLoRA(r=4),
    "qalora": QALoRA(r=4, group_size=16),
}
STORES = {"nf4": NormalFloat(), "int3": Uniform(3, 16), "mxint4": BlockFloat(4, 16)}


def _model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32, bias=False)).to(dtype)


def _packed(store, dtype=torch.float32):
    model = _model(dtype)
    keep(model, {"0.weight": store, "2.weight": store})
    return model


def _nudge(bank):
    with torch.no_grad():
        for _, parameter, _ in bank.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.2)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_attach_train_merge(method, store):
    """Identity at start; gives what it does on the unpacked twin; merges into a dense weight; unmerge and detach bring back the bytes."""
    model, x = _packed(store).eval(), torch.randn(5, 64)
    twin = copy.deepcopy(model)
    unpack(twin)
    before, weight = model(x), model[0].weight
    bytes_before = {n: p.clone() for n, p in weight.parts.items()}
    torch.manual_seed(1)
    bank = rl.attach(model, method)
    torch.manual_seed(1)
    other = rl.attach(twin, method)
    assert torch.allclose(model(x), before, atol=1e-6)
    _nudge(bank)
    with torch.no_grad():
        for (_, mine, _), (_, theirs, _) in zip(bank.tensors("default"), other.tensors("default")):
            theirs.copy_(mine)
    spoken = model(x)
    assert (spoken - before).abs().max() > 1e-2
    assert torch.allclose(spoken, twin(x), atol=1e-5)
    spoken.square().sum().backward()
    trained = [p for _, p, _ in bank.trainable()]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    bank.merge("default")
    assert not isinstance(model[0].weight, Packed)
    assert model[0].weight.dtype == torch.float32
    assert torch.allclose(model(x), spoken, atol=1e-5)
    bank.unmerge()
    assert model[0].weight is weight
    rl.detach(model)
    assert all(torch.equal(p, bytes_before[n]) for n, p in model[0].weight.parts.items())
    assert torch.allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("method", [METHODS["lora"], METHODS["dora"]], ids=["lora", "dora"])
def test_bf16_base_keeps_float32_masters(method):
    """A packed bf16 base: adapters are float32, output and merged weight bf16."""
    model, x = _packed(NormalFloat(), torch.bfloat16).eval(), torch.randn(5, 64, dtype=torch.bfloat16)
    bank = rl.attach(model, method)
    _nudge(bank)
    assert {p.dtype for _, p, _ in bank.trainable()} == {torch.float32}
    spoken = model(x)
    assert spoken.dtype == torch.bfloat16
    bank.merge("default")
    assert model[0].weight.dtype == torch.bfloat16
    assert (model(x) - spoken).float().norm() < 0.02 * spoken.float().norm()


LAYERS = {
    "transposed": (lambda: Conv1D(48, 64), lambda: torch.randn(3, 64)),
    "embedding": (lambda: nn.Embedding(11, 64), lambda: torch.randint(11, (3, 4))),
    "conv": (lambda: nn.Conv2d(16, 32, 3, padding=1), lambda: torch.randn(2, 16, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "method", [METHODS["lora"], METHODS["dora"], METHODS["dylora"]], ids=["lora", "dora", "dylora"]
)
def test_other_layers(kind, method):
    """GPT-2's Conv1D, embeddings and convolutions on a packed weight: identity, merged equals unmerged."""
    make, batch = LAYERS[kind]
    model, x = nn.ModuleDict({"layer": make()}), batch()
    keep(model, {"layer.weight": NormalFloat()})
    run = lambda: model["layer"](x)  # noqa: E731
    before = run()
    bank = rl.attach(model, method, target_modules=["layer"])
    assert torch.allclose(run(), before, atol=1e-6)
    _nudge(bank)
    spoken = run()
    assert (spoken - before).abs().max() > 1e-2
    bank.merge("default")
    assert torch.allclose(run(), spoken, atol=1e-4)
    bank.unmerge()
    assert isinstance(model["layer"].weight, Packed)
    assert torch.equal(run(), spoken)


def test_bare_parameter():
    """A packed bare parameter hears its adapter too."""
    model = nn.Linear(64, 48)
    keep(model, {"weight": NormalFloat()})
    x = torch.randn(3, 64)
    before = model(x)
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=(), target_parameters=["weight"])
    _nudge(bank)
    spoken = model(x)
    assert (spoken - before).abs().max() > 1e-2
    bank.merge("default")
    assert torch.allclose(model(x), spoken, atol=1e-5)


def test_compiled_with_an_adapter():
    """LoRA on a packed base compiles whole and agrees, gradients included."""
    model, x = _packed(NormalFloat()), torch.randn(5, 64)
    bank = rl.attach(model, rl.LoRA(r=4))
    _nudge(bank)
    trained = [p for _, p, _ in bank.trainable()]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)
    mine = torch.autograd.grad(compiled(x).square().sum(), trained)
    theirs = torch.autograd.grad(model(x).square().sum(), trained)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(mine, theirs))


def test_training_leaves_the_bytes():
    """Twenty AdamW steps move the adapter only: no byte of the base changes, and the loss falls."""
    model, x, target = _packed(NormalFloat()), torch.randn(32, 64), torch.randn(32, 32)
    before = copy.deepcopy(model)
    bank = rl.attach(model, rl.LoRA(r=4))
    optimizer = torch.optim.AdamW([p for _, p, _ in bank.trainable()], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for layer, old in ((model[0], before[0]), (model[2], before[2])):
        assert all(torch.equal(p, old.weight.parts[n]) for n, p in layer.weight.parts.items())
        assert layer.weight.grad is None
        assert torch.equal(dense(layer.weight), dense(old.weight))
