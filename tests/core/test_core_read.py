"""Layers whose weight is read without calling them: the change is in what is read, in training and evaluation."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from core_tiny import nudge
from torch import nn

import rankloom as rl
from rankloom.core.read import Read
from rankloom.core.slots import unseen_by_calls
from rankloom.errors import StateError

D = torch.float64
METHODS = {
    "lora": rl.LoRA(r=2),
    "dora": rl.DoRA(rl.LoRA(r=2)),
    "vera": rl.VeRA(r=4),
    "adalora": rl.AdaLoRA(init_r=3, target_r=2),
    "lora with bias": rl.LoRA(r=2, lora_bias=True),
}


class Kernel(nn.Module):
    """Reads the weight of a layer for a product of its own, asks for its dtype, and calls another."""

    def __init__(self, dtype=D):
        super().__init__()
        self.read, self.called = nn.Linear(8, 6, dtype=dtype), nn.Linear(6, 4, dtype=dtype)

    def forward(self, x):
        x = x.to(self.read.weight.dtype)
        return self.called(torch.tanh(x @ self.read.weight.T + self.read.bias))


class Ask(nn.Module):
    """Lets a function look at the model as a kernel inside would."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, look):
        return look(self.model)


def weight_of(model):
    """The weight as it is read while the model runs."""
    return Ask(model)(lambda m: m.read.weight)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.read = nn.Conv1d(8, 6, 3, padding=1, dtype=D)

    def forward(self, x):
        return F.conv1d(x.mT, self.read.weight, self.read.bias, padding=1)


class Tied(nn.Module):
    """An embedding whose table is also the head."""

    def __init__(self):
        super().__init__()
        self.read = nn.Embedding(11, 8, dtype=D)

    def forward(self, x):
        return F.linear(x, self.read.weight)


MODELS = {"linear": Kernel, "convolution": Convolved, "embedding": Tied}


def made(kind, method, **settings):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    bank = rl.attach(model, method, target_modules=["read"], **settings)
    return model, bank


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_it_starts_at_the_base_speaks_and_merges_to_what_it_spoke(kind, name, train):
    if (kind, name) in {("convolution", "vera"), ("embedding", "vera"), ("embedding", "lora with bias")}:
        pytest.skip("refused when it is attached")
    x = torch.randn(3, 5, 8, dtype=D)
    torch.manual_seed(0)
    plain = MODELS[kind]()
    model, bank = made(kind, METHODS[name])
    model.train(train)
    assert torch.equal(model(x), plain(x))
    nudge(bank)
    given = model(x)
    assert (given - plain(x)).abs().max() > 1e-3
    given.square().sum().backward()
    assert all(p.grad is not None for _, p, _ in bank.trainable())
    with torch.no_grad():
        assert torch.equal(model(x), given)
    with bank.using():
        assert torch.equal(model(x), plain(x))
    bank.merge()
    torch.testing.assert_close(model(x), given, rtol=0, atol=1e-12)
    rl.detach(model)
    assert type(model.read.weight) is nn.Parameter


def test_gradients_are_those_of_the_called_layer():
    torch.manual_seed(0)
    model = Kernel()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["read"])
    nudge(bank)
    x = torch.randn(3, 8, dtype=D)
    asked = [p for _, p, _ in bank.trainable()]
    read = torch.autograd.grad(model(x).sum(), asked)
    called = torch.autograd.grad(model.called(torch.tanh(model.read(x))).sum(), asked)
    for ours, theirs in zip(read, called):
        torch.testing.assert_close(ours, theirs)


def test_a_look_at_a_weight_computes_nothing(monkeypatch):
    model, bank = made("linear", rl.LoRA(r=2))
    nudge(bank)
    _, adapter = next(bank.adapters())
    monkeypatch.setattr(type(adapter), "delta", lambda *_: pytest.fail("a change was computed"))
    weight = weight_of(model)
    frozen = dict(model.named_parameters())["read.weight"]
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.device, weight.shape, weight.ndim) == (D, frozen.device, (6, 8), 2)
    assert (weight.size(0), weight.numel(), weight.requires_grad, weight.is_leaf) == (6, 48, False, True)
    assert weight.data_ptr() == frozen.data_ptr()
    assert weight.is_floating_point()
    assert torch.is_floating_point(weight)
    model.read(torch.zeros(2, 8, dtype=D))


def test_writing_in_place_writes_the_frozen_weight():
    model, bank = made("linear", rl.LoRA(r=2))
    nudge(bank)
    frozen = dict(model.named_parameters())["read.weight"]
    with torch.no_grad():
        weight_of(model).zero_()
        assert not frozen.any()
        nn.init.ones_(weight_of(model))
        assert bool((frozen == 1).all())
        weight_of(model)[0] = 2.0
        assert bool((frozen[0] == 2).all())
        target = torch.zeros(6, 8, dtype=D)
        target.copy_(weight_of(model))
    torch.testing.assert_close(target, frozen + bank.delta("default")["read"])


def test_nothing_is_read_where_nothing_is_active():
    model, bank = made("linear", rl.LoRA(r=2))
    assert isinstance(weight_of(model), Read)
    assert model.read.weight is dict(model.named_parameters())["read.weight"]
    with bank.using():
        assert type(weight_of(model)) is nn.Parameter
    bank.merge()
    assert type(weight_of(model)) is nn.Parameter


def test_several_with_weights_and_rows_refused():
    model, bank = made("linear", rl.LoRA(r=2))
    rl.attach(model, rl.LoRA(r=3), "b", target_modules=["read"])
    nudge(bank)
    nudge(bank, "b")
    x = torch.randn(2, 8, dtype=D)
    with bank.using(default=0.5, b=-2.0):
        model_with = model(x)
        torch.testing.assert_close(model_with, model.called(torch.tanh(model.read(x))))
    with bank.using(rows=["default", "b"]), pytest.raises(StateError, match="'read' is read without being called"):
        model(x)


def test_a_change_without_a_matrix_says_what_to_do():
    model, bank = made("linear", rl.hydralora(r=2, n_b=2))
    nudge(bank)
    with pytest.raises(StateError, match=r"'read' is read without being called.*exclude_modules=\['read'\]"):
        model(torch.randn(2, 8, dtype=D))
    rl.detach(model)
    rl.attach(model, rl.hydralora(r=2, n_b=2), exclude_modules=["read"])
    model(torch.randn(2, 8, dtype=D))


def test_threads_that_call_and_read_the_same_layer():
    torch.manual_seed(0)
    model = Kernel().eval()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["read"])
    nudge(bank)
    x = torch.randn(4, 8, dtype=D)
    with torch.no_grad():
        read, called = model(x), model.read(x)
        wrong = []

        def work(turn):
            with torch.no_grad():
                for _ in range(50):
                    good = torch.equal(model(x), read) if turn % 2 else torch.equal(model.read(x), called)
                    wrong.extend([] if good else [turn])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert not wrong


def test_compiled():
    torch.manual_seed(0)
    model = Kernel().eval()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["read", "called"])
    nudge(bank)
    x = torch.randn(4, 8, dtype=D)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    with bank.using():
        torch.testing.assert_close(compiled(x), model(x))


def test_packed():
    torch.manual_seed(0)
    model = Kernel(torch.float32).eval()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["read"], store=rl.NormalFloat(4))
    nudge(bank)
    x = torch.randn(4, 8)
    torch.testing.assert_close(model(x), model.called(torch.tanh(model.read(x))))


def test_copies_and_files(tmp_path):
    model, bank = made("linear", rl.LoRA(r=2))
    nudge(bank)
    x = torch.randn(3, 8, dtype=D)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert set(model.state_dict()) >= {"read.weight", "called.weight"}
    rl.save(model, tmp_path / "a")
    torch.manual_seed(0)
    again = Kernel().eval()
    rl.load(again, tmp_path / "a")
    torch.testing.assert_close(again(x), model(x))


def test_data_parallel_is_refused_by_name():
    model, _ = made("linear", rl.LoRA(r=2))
    with pytest.raises(StateError, match=r"'read'.*torchrun"):
        model.read._replicate_for_data_parallel()


class Peeks(nn.Module):
    """Asks for a weight's dtype and for a bias before it calls the layer, as T5 does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.read = nn.Linear(8, 8)

    def forward(self, x):
        if self.read.bias is not None and self.read.weight.dtype != x.dtype:
            x = x.to(self.read.weight.dtype)
        return self.read(x)


PEEKED = {
    "lora": rl.LoRA(r=2), "lora with bias": rl.LoRA(r=2, lora_bias=True), "hydralora": rl.hydralora(r=2, n_b=2),
}  # fmt: skip


@pytest.mark.parametrize("store", [None, rl.NormalFloat(4)])
@pytest.mark.parametrize("name", PEEKED)
def test_a_model_that_only_looks_is_one_that_calls(name, store, tmp_path):
    """No sum is made, no method refused, no row: and PEFT is not said to miss anything."""
    model = Peeks().eval()
    for adapter in ("a", "b"):
        rl.attach(model, PEEKED[name], adapter, store=store)
        nudge(model.rankloom, adapter)
    x = torch.randn(2, 3, 8, dtype=D)
    each = []
    for adapter in ("a", "b"):
        with model.rankloom.using(adapter):
            each.append(model(x))
    with model.rankloom.using(rows=["a", "b"]):
        both = model(x)
    torch.testing.assert_close(both, torch.stack([each[0][0], each[1][1]]), rtol=0, atol=1e-5)
    assert not unseen_by_calls(model.read, "layer")
    if name == "lora" and store is None:
        assert rl.save(model, tmp_path / "a", "a").compat.peft.ok


def test_a_look_under_compilation_refuses_no_method():
    model = Peeks().eval()
    nudge(rl.attach(model, rl.hydralora(r=2, n_b=2)))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_the_dropout_of_an_input_that_is_not_there_is_told():
    model, bank = made("linear", rl.LoRA(r=2, lora_dropout=0.5))
    nudge(bank)
    x = torch.randn(2, 8, dtype=D)
    model(x)
    model.train()
    with pytest.warns(UserWarning, match="'read' is read without being called: the dropout"):
        model(x)
