"""torch.compile of real models: one graph for every method, several active adapters and a packed base, and its gradients."""

import pytest
import torch
from core_tiny import adapted, difference, llama, nudge, tokens
from torch import nn
from torch._dynamo.testing import CompileCounter

import rankloom as rl
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

IDS = tokens()
METHODS = {
    "LoRA": rl.LoRA(r=2),
    "DoRA": rl.DoRA(rl.LoRA(r=2)),
    "VeRA": rl.VeRA(r=3),
    "AdaLoRA": rl.AdaLoRA(init_r=3, target_r=2),
    "DyLoRA": rl.DyLoRA(r=3),
    "HydraLoRA": rl.hydralora(r=2, n_b=2),
}


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(model):
    return model(IDS, use_cache=False).logits


def packed(store):
    model = llama(depth=1)
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    keep(model, dict.fromkeys([f"{n}.weight" for n in linear], store))
    return model


def assert_one_graph(model, bank, backend="eager"):
    """Forward and every gradient, of one graph and of eager code."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    found = []
    for one in (model, compiled):
        model.zero_grad()
        out = run(one)
        out.square().sum().backward()
        found.append((out, {k: p.grad.clone() for k, p, _ in bank.trainable(*bank.active)}))
    (out, gradients), (fast, fast_gradients) = found
    assert difference(fast, out) < 1e-12
    assert gradients.keys() == fast_gradients.keys()
    for key, gradient in gradients.items():
        assert difference(fast_gradients[key], gradient) < 1e-10, key


@pytest.mark.parametrize("name", METHODS)
def test_training_is_one_graph(name):
    model, bank = adapted("a", method=METHODS[name], model=llama(depth=1), target_modules=["q_proj", "up_proj"])
    assert_one_graph(model, bank)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA"])
def test_over_a_packed_base(name):
    model, bank = adapted("a", method=METHODS[name], model=packed(NormalFloat()), target_modules=["q_proj", "up_proj"])
    assert_one_graph(model, bank)


@pytest.mark.parametrize("store", [Uniform(bits=4, group=8), BlockFloat()], ids=str)
def test_over_other_stores(store):
    model, bank = adapted("a", model=packed(store), target_modules=["q_proj"])
    assert_one_graph(model, bank)


@torch.no_grad()
def test_several_voices_with_tensor_weights_are_one_graph():
    model, bank = adapted("a", "b", model=llama(depth=1), target_modules=["q_proj", "up_proj"])
    rl.attach(model, METHODS["DoRA"], "c", target_modules=["q_proj"])
    nudge(bank, "c")
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for i in range(4):
        bank.use(a=torch.tensor(0.1 * i), b=torch.rand(2), c=torch.rand(2, 6))
        assert difference(run(compiled), run(model)) < 1e-12
    assert counter.frame_count == 1
