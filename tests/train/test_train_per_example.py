"""Gradients for each example by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_world import llama, mlp, points, texts

import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.train.loss import default_loss
from rankloom.train.per_example import per_example_gradients

METHODS = {
    "lora": rl.LoRA(r=2),
    "dora": rl.DoRA(rl.LoRA(r=2)),
    "adalora": rl.AdaLoRA(init_r=2, target_r=1),
    "vera": rl.VeRA(r=8),
}


def by_loop(model, examples):
    found = []
    for one in examples:
        loss = default_loss(model, one)
        gradients = torch.autograd.grad(loss, [p for _, p, _ in model.rankloom.trainable()])
        found.append(gradients)
    return {key: torch.stack([g[i] for g in found]) for i, (key, _, _) in enumerate(model.rankloom.trainable())}


def shaken(model, method, targets):
    rl.attach(model, method, target_modules=targets)
    for _, p, _ in model.rankloom.trainable():
        p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_equal_to_a_loop(method):
    """A linear net in float64 and a tiny Llama: the loop over single examples to 1e-6; nothing is left on the model."""
    model = shaken(mlp().double(), METHODS[method], ["0", "2"])
    (x, y), fused = points(1)[0], model.rankloom.selector.fused
    batch = (x.double(), y.double())
    found = per_example_gradients(model, batch)
    want = by_loop(model, [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(len(x))])
    assert found.keys() == want.keys()
    assert all(torch.allclose(found[k], want[k], atol=1e-6) for k in want)
    assert any(float(g.std(0).max()) > 1e-6 for g in found.values())
    assert model.rankloom.selector.fused == fused
    assert all(p.grad is None for p in model.parameters())


def test_a_language_model():
    """Masks and padding as usual: each row's own mean over its labels."""
    model, batch = shaken(llama(), rl.LoRA(r=2), ["q_proj", "up_proj"]), texts(1)[0]
    with pytest.raises(SettingsError, match="set_attn_implementation"):
        per_example_gradients(model, batch)
    model.set_attn_implementation("eager")
    found = per_example_gradients(model, batch)
    want = by_loop(model, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)])
    assert all(torch.allclose(found[k], want[k], atol=1e-6) for k in want)


def test_a_loss_of_ones_own_and_only_what_trains():
    """`loss` as in `fit`; an adapter that `bank.train` leaves out has no gradient."""
    model = shaken(mlp(), rl.LoRA(r=2), ["0"])
    rl.attach(model, rl.LoRA(r=2), "new", target_modules=["2"])
    model.rankloom.use("default", "new")
    model.rankloom.train("new")
    x, y = points(1)[0]
    found = per_example_gradients(model, (x, y), lambda m, b: nn.functional.l1_loss(m(b[0]), b[1]))
    assert found.keys() == {"new/2:A", "new/2:B"}
    assert found["new/2:B"].shape == (8, 3, 2)


def test_tensors_that_disagree_are_refused():
    """Not silent: another number of rows."""
    model = shaken(mlp(), rl.LoRA(r=2), ["0"])
    with pytest.raises(SettingsError, match=r"\[7, 8\]"):
        per_example_gradients(model, (points(1)[0][0], points(1)[0][1][:7]))
