"""What loading costs: counted, not timed."""

from __future__ import annotations

import gc

import pytest
import torch
from formats_tiny import net, saved

import rankloom as rl
from rankloom.core import graft
from rankloom.errors import FileError
from rankloom.formats import base, loading


def test_the_trial_copy_is_of_the_base_alone(tmp_path):
    model = net()
    bare = [(n, type(m)) for n, m in model.named_modules()]
    rl.attach(model, rl.LoRA(r=2), target_modules=["q"])
    copied = base.skeleton(model)
    assert [(n, type(m)) for n, m in copied.named_modules()] == bare
    assert not hasattr(copied, "rankloom")
    assert all("_rankloom" not in vars(m) for m in copied.modules())
    assert hasattr(model, "rankloom")


@pytest.mark.parametrize("others", [1, 9])
def test_loading_costs_the_same_however_many_adapters_there_are(others, tmp_path, monkeypatch):
    folder, model = saved(tmp_path / "a"), net()
    tensors = sum(1 for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
    sites = sum(1 for _ in rl.load(model, folder, "n0").adapters("n0"))
    for i in range(1, others):
        rl.load(model, folder, f"n{i}")
    added, copied = [], []
    add, meta = graft.add_adapter, base._meta
    monkeypatch.setattr("rankloom.core.attach.add_adapter", lambda *a: (added.append(a), add(*a))[1])
    monkeypatch.setattr(base, "_meta", lambda t: (copied.append(t), meta(t))[1])
    rl.load(model, folder, "last")
    assert len(added) == sites
    assert len(copied) <= tensors


def test_nothing_is_added_before_the_file_fits(tmp_path, monkeypatch):
    folder, other = saved(tmp_path / "a"), net()
    other.layers[1].q = torch.nn.Linear(8, 5)
    monkeypatch.setattr("rankloom.core.attach.add_adapter", lambda *_: pytest.fail("added"))
    with pytest.raises(FileError):
        rl.load(other, folder)
    assert not hasattr(other, "rankloom")


@pytest.mark.parametrize("running", [True, False])
def test_the_collector_is_as_it_was_before(running, tmp_path):
    folder = saved(tmp_path / "a")
    was = gc.isenabled()
    (gc.enable if running else gc.disable)()
    try:
        rl.load(net(), folder)
        assert gc.isenabled() is running
        with pytest.raises(FileError):
            loading.load(torch.nn.Linear(2, 2), folder)
        assert gc.isenabled() is running
    finally:
        (gc.enable if was else gc.disable)()
