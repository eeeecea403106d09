"""What switching, attaching and removing cost: counted, not timed."""

import gc
import weakref

import pytest
import torch
from core_tiny import adapted, tower, words

import rankloom as rl

IDS = words(batch=4, tokens=5)


@pytest.mark.parametrize("depth", [1, 12])
@pytest.mark.parametrize("count", [1, 20])
def test_switching_touches_no_layer(depth, count, monkeypatch):
    names = [f"n{i}" for i in range(count)]
    model, bank = adapted(*names, model=tower(depth=depth))
    touched = []
    for cls in {type(m) for m in model.modules()}:
        monkeypatch.setattr(
            cls, "__getattribute__", lambda s, n, g=cls.__getattribute__: (touched.append(n), g(s, n))[1]
        )
        monkeypatch.setattr(cls, "__setattr__", lambda s, n, v: touched.append(n))
    bank.use(names[-1])
    with bank.using(names[0]):
        assert set(bank.active) == {names[0]}
    bank.use(**{names[0]: 0.5})
    assert touched == []
    model(IDS)
    assert touched


@pytest.mark.parametrize("count", [1, 20])
def test_a_forward_reads_only_the_adapters_that_speak(count, monkeypatch):
    names = [f"n{i}" for i in range(count)]
    model, bank = adapted(*names)
    calls = []
    adapter_class = type(next(bank.adapters())[1])
    monkeypatch.setattr(adapter_class, "forward", lambda self, x, y, base: calls.append(self) or torch.zeros_like(y))
    bank.use(names[-1])
    with torch.no_grad():
        model(IDS)
    assert len(calls) == 5
    assert set(map(id, calls)) == {id(a) for _, a in bank.adapters(names[-1])}


def test_attaching_does_not_grow_with_the_adapters_that_are_there(monkeypatch):
    from rankloom.core import attach, targets

    visits = []
    original = targets.base_modules

    def counting(model, prefix=""):
        for found in original(model, prefix):
            visits.append(found[0])
            yield found

    monkeypatch.setattr(targets, "base_modules", counting)
    model, _ = adapted("n0")
    counts = []
    for i in range(1, 12):
        visits.clear()
        attach.attach(model, rl.LoRA(r=2), f"n{i}", target_modules=["q_proj", "v_proj"])
        counts.append(len(visits))
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_a_removed_adapter_is_freed():
    model, bank = adapted("a", "b")
    model(IDS).sum().backward()
    kept = [weakref.ref(p) for _, p, _ in bank.tensors("a")]
    bank.merge("a")
    rl.detach(model, "a")
    model.zero_grad()
    gc.collect()
    assert len(kept) == 10
    assert all(ref() is None for ref in kept)
