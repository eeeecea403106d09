"""Copies and pickles are equal and independent, of models and of single layers."""

import copy
import io
import pickle

import pytest
import torch
from core_tiny import adapted, difference, nudge, tower, words
from torch import nn

import rankloom as rl

IDS = words()

METHODS = [
    rl.LoRA(r=2),
    rl.DoRA(rl.LoRA(r=2)),
    rl.VeRA(r=3),
    rl.hydralora(r=2, n_b=2),
    rl.LoRA(r=2, init_lora_weights="pissa"),
]
LINEAR = {"target_modules": ["q_proj", "v_proj"]}


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, through_torch])
def test_copies_are_equal_and_independent(method, duplicate):
    model, bank = adapted("a", "b", method=method, **LINEAR, trainable_token_indices=[1], modules_to_save=["head"])
    out = model(IDS)
    twin = duplicate(model)
    assert torch.equal(twin(IDS), out)
    assert twin.rankloom.model is twin
    assert twin.rankloom.selector is not bank.selector
    nudge(twin.rankloom, seed=9)
    twin.rankloom.use("b", a=0.3)
    assert torch.equal(model(IDS), out)
    changed = twin(IDS)
    assert difference(changed, out) > 1e-3
    with twin.rankloom.using():
        assert torch.equal(twin(IDS), tower()(IDS))
    assert torch.equal(twin(IDS), changed)
    rl.detach(twin)
    assert torch.equal(twin(IDS), tower()(IDS))
    assert {type(m) for m in twin.modules()} == {type(m) for m in tower().modules()}


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copied_layer_speaks_alone(duplicate):
    for method in METHODS:
        model, _ = adapted("a", method=method, **LINEAR)
        layer, x = model.layers[1].q_proj, torch.randn(2, 8, dtype=torch.float64)
        twin = duplicate(layer)
        assert torch.equal(twin(x), layer(x)), method
        assert isinstance(twin, nn.Linear)
        assert difference(twin(x), nn.functional.linear(x, layer.weight, layer.bias)) > 1e-3


def test_a_copy_of_a_merged_model_unmerges():
    model, bank = adapted("a")
    base = tower()(IDS)
    bank.merge()
    twin = copy.deepcopy(model)
    twin.rankloom.unmerge()
    with twin.rankloom.using():
        assert torch.equal(twin(IDS), base)
    assert bank.merged == ("a",)


@pytest.mark.parametrize("change", [lambda m: m.to(torch.float32), copy.deepcopy, pickled, lambda m: m.to("meta")])
def test_shared_tensors_stay_shared(change):
    model, _ = adapted("a", method=rl.VeRA(r=3), **LINEAR)
    changed = change(model)
    found = [adapter for _, adapter in changed.rankloom.adapters("a")]
    shared = changed.rankloom.shared_of("a")
    assert len(found) == 4
    assert all(a.A is shared.tensor("vera_A") and a.B is shared.tensor("vera_B") for a in found)
    assert sum(p is shared.tensor("vera_A") for p in changed.parameters()) == 1
    assert sum("vera_A" in key for key in changed.state_dict()) == 1
    assert found[0].A.dtype == changed.layers[0].q_proj.weight.dtype
    assert found[0].A.device == changed.layers[0].q_proj.weight.device
    assert not found[0].A.requires_grad
