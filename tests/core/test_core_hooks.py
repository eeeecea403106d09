"""Hooks on adapters fire wherever the change is computed, and what a method does by default its inner methods do."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from core_tiny import adapted, difference, tower, words
from torch import nn

import rankloom as rl
from rankloom.core.adapter import Adapter, borrowed
from rankloom.core.method import Method
from rankloom.core.rule import Rule

IDS = words()


def listen(bank, name="a"):
    """The changes that every adapter, inner ones too, gives in a forward pass."""
    seen: dict[str, list[torch.Tensor]] = {}
    for site, adapter in bank.adapters(name):
        for path, module in adapter.named_modules():
            if isinstance(module, Adapter):
                keep = seen.setdefault(f"{site}:{path}", [])
                module.register_forward_hook(lambda m, args, out, keep=keep: keep.append(out))
    return seen


@pytest.mark.parametrize(
    "method",
    [
        rl.LoRA(r=2),
        rl.DoRA(rl.LoRA(r=2)),
        rl.LoRA(r=2, init_lora_weights="pissa"),
        rl.Slices(rl.LoRA(r=2), parts=2, on=(0,)),
        rl.TiedLoRA(r=2),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("training", [False, True])
def test_hooks_see_every_change(method, training):
    """In evaluation, and in training, where the fused path computes what nobody listens to."""
    model, bank = adapted("a", method=method, target_modules=["q_proj", "v_proj"])
    plain, _ = adapted("a", method=method, target_modules=["q_proj", "v_proj"])
    seen = listen(bank)
    with torch.set_grad_enabled(training):
        out = model.train(training)(IDS)
        assert difference(out, plain.train(training)(IDS)) < 1e-12
    assert {key: len(found) for key, found in seen.items()} == dict.fromkeys(seen, 1)
    with bank.using():
        model(IDS)
    assert all(len(found) == 1 for found in seen.values())


def test_a_hook_can_penalise_the_change():
    """What a hook keeps is alive: a penalty on it reaches the adapter's tensors."""
    model, bank = adapted("a", target_modules=["q_proj"])
    seen = listen(bank)
    model.train()(IDS)
    sum(change.square().sum() for found in seen.values() for change in found).backward()
    assert all(p.grad.abs().max() > 0 for _, p, _ in bank.trainable("a"))


def test_hooks_fire_for_rows_and_parameters():
    model, bank = adapted("a", "b", target_modules=["q_proj"])
    seen = listen(bank)
    with torch.no_grad(), bank.using(rows=["a", "b", "a"]):
        model(IDS)
        model(IDS)
    assert all(len(found) == 2 for found in seen.values())
    model = tower()
    bank = rl.attach(model, rl.LoRA(r=2), "a", target_modules=[], target_parameters=["q_proj.weight"])
    seen = listen(bank)
    model(IDS)
    assert all(len(found) == 1 for found in seen.values())


def test_without_hooks_nothing_is_called_apart():
    """Hooks cost nothing where there are none: training fuses as before, and again once they are taken off."""
    model, bank = adapted("a", target_modules=["q_proj"])
    model.train()(IDS)
    anchors = [m.__dict__["_rankloom"] for m in model.modules() if "_rankloom" in m.__dict__]
    assert [a.memo.plain for a in anchors] == ["", ""]
    handles = [adapter.register_forward_hook(lambda m, args, out: None) for _, adapter in bank.adapters("a")]
    model(IDS)
    assert all(a.memo.plain for a in anchors)
    for handle in handles:
        handle.remove()
    model(IDS)
    assert [a.memo.plain for a in anchors] == ["", ""]


def test_a_router_runs_once_in_training():
    """A change that depends on its input is computed once in a pass, though the fused path was asked first."""
    model, bank = adapted("a", method=rl.hydralora(r=2), target_modules=["q_proj"])
    calls = []
    for _, adapter in bank.adapters("a"):
        adapter.weights = lambda x, base, of=adapter.weights: (calls.append(1), of(x, base))[1]
    model.train()(IDS)
    assert len(calls) == 2


class Nothing(Rule):
    """A rule that can be told apart."""


@dataclass(frozen=True)
class Leaf(rl.LoRA):
    """A leaf with a rule and a patch."""

    def rules(self):
        return [Nothing()]

    def patch(self, model):
        model.patched = getattr(model, "patched", 0) + 1
        return _Undo(model)


class _Undo:
    def __init__(self, model):
        self.model = model

    def __call__(self):
        self.model.patched -= 1


@dataclass(frozen=True)
class Both(Method):
    """A combinator that forwards nothing by hand."""

    one: Method = field(default_factory=Leaf)
    two: Method = field(default_factory=Leaf)

    def build(self, site):
        return self.one.build(site)


def test_rules_and_patch_are_those_of_the_inner_methods():
    model = nn.Sequential(nn.Linear(4, 4))
    assert [type(rule) for rule in Both().rules()] == [Nothing, Nothing]
    for method, times in ((Both(), 2), (rl.DoRA(Leaf()), 1), (rl.Slices(Leaf(), parts=2, on=(0,)), 1)):
        rl.attach(model, method, target_modules=["0"])
        assert model.patched == times
        assert len(method.rules()) == times
        rl.detach(model)
        assert model.patched == 0


def test_borrowed_finds_what_inner_adapters_share():
    model, bank = adapted("a", method=rl.DoRA(rl.TiedLoRA(r=2)), target_modules=["q_proj"])
    shared = {id(p) for p in bank.shared_of("a").parameters()}
    assert len(shared) == 2
    for _, adapter in bank.adapters("a"):
        assert {id(p) for p in borrowed(adapter)} == shared
        assert not shared & {id(p) for p in adapter.parameters()}
    assert not list(borrowed(next(a for _, a in adapted("b", target_modules=["q_proj"])[1].adapters("b"))))
