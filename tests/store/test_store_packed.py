"""A packed weight lives as any parameter does: moved, copied, saved, compiled, trained on; and stays packed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankloom.errors import StateError, TargetError
from rankloom.store import dense
from rankloom.store.base import Packed
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.model import keep, unpack
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

STORES = {
    "nf4": NormalFloat(),
    "nf2": NormalFloat(2, double=False),
    "nested": NestedFloat(3, 4, "float16", 16, 16),
    "int3": Uniform(3, 16),
    "mxint4": BlockFloat(4, 16),
}
every_store = pytest.mark.parametrize("store", STORES.values(), ids=STORES)


def _linear(store=STORES["nf4"], dtype=torch.float32, **settings):
    layer = nn.Linear(64, 48, dtype=dtype, **settings)
    keep(layer, {"weight": store})
    return layer


def _same(a, b):
    assert isinstance(a, Packed)
    assert isinstance(b, Packed)
    assert (a.store, a.shape, a.dtype, a.part_names) == (b.store, b.shape, b.dtype, b.part_names)
    assert all(torch.equal(a.parts[n], b.parts[n]) for n in a.part_names)


@every_store
def test_forward_is_that_of_the_rounded_weight(store):
    """y = x Ŵᵀ + b, with Ŵ the store's round trip, for one, two and three dims of input."""
    plain = nn.Linear(64, 48)
    layer = copy.deepcopy(plain)
    keep(layer, {"weight": store})
    rounded = store.round_trip(plain.weight)
    assert 0 < (rounded - plain.weight).abs().max() < 0.2
    for shape in ((64,), (5, 64), (2, 3, 64)):
        x = torch.randn(shape)
        assert torch.equal(layer(x), F.linear(x, rounded) + plain.bias)
    assert torch.equal(dense(layer.weight), rounded)
    assert type(dense(layer.weight)) is torch.Tensor


@every_store
def test_gradient_of_the_input(store):
    """The input's gradient is g Ŵ; the packed weight has none and cannot be asked for one."""
    layer = _linear(store, torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    g = torch.randn(3, 48, dtype=torch.float64)
    layer(x).backward(g)
    assert torch.allclose(x.grad, g @ dense(layer.weight), atol=1e-12)
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad
    assert layer.bias.grad is not None


@every_store
def test_bytes_are_those_of_the_store(store):
    """What is held: the store's bits per weight, far below 16 bits; and no attribute holds the dense weight."""
    weight = _linear(store).weight
    assert weight.stored_bytes == sum(p.numel() * p.element_size() for p in weight.parts.values())
    assert weight.stored_bytes * 8 / weight.numel() == pytest.approx(store.bits_per_weight(), rel=0.02)
    assert weight.stored_bytes < 2 * weight.numel() / 2
    assert all(p.numel() < weight.numel() for p in weight.parts.values())


class _Saved:
    """Plain tensors that autograd keeps for the backward."""

    def __enter__(self):
        self.kept: list[torch.Tensor] = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, t):
        self.kept.append(t)
        return t

    def dense(self, numbers):
        return [t for t in self.kept if not isinstance(t, Packed) and t.untyped_storage().nbytes() >= 4 * numbers]


LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), lambda: torch.randn(2, 64)),
    "transposed": (lambda: Conv1D(48, 64), lambda: torch.randn(2, 64)),
    "conv": (lambda: nn.Conv2d(16, 32, 3), lambda: torch.randn(1, 16, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_backward_keeps_no_dense_weight(kind):
    """Nothing of the dense weight's size is saved for the backward, which is exact all the same."""
    make, batch = LAYERS[kind]
    layer, x = make(), batch().requires_grad_()
    with _Saved() as plain:
        layer(x).sum()
    assert plain.dense(layer.weight.numel()), "the measure does not see a dense weight"
    keep(layer, {"weight": NormalFloat()})
    rounded = copy.deepcopy(layer)
    unpack(rounded)
    with _Saved() as saved:
        y = layer(x)
    assert not saved.dense(layer.weight.numel())
    (mine,) = torch.autograd.grad(y.square().sum(), x)
    (theirs,) = torch.autograd.grad(rounded(x).square().sum(), x)
    assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_embedding():
    """A table is read by unpacking it; ids, padding row and a tied head work."""
    table = nn.Embedding(11, 64, padding_idx=0)
    keep(table, {"weight": NormalFloat()})
    ids = torch.tensor([[1, 0, 10]])
    assert torch.equal(table(ids), dense(table.weight)[ids])
    assert not table(ids)[0, 1].any()
    assert torch.equal(F.linear(torch.eye(64), table.weight), dense(table.weight).T)


def test_state_dict():
    """state_dict holds the packed weight; it loads strictly, by copy and by assignment, and takes a dense one by packing."""
    layer, other = _linear(), _linear()
    state = layer.state_dict()
    _same(state["weight"], layer.weight)
    assert not torch.equal(dense(other.weight), dense(layer.weight))
    parts = other.weight.parts
    other.load_state_dict(state)
    _same(other.weight, layer.weight)
    assert all(other.weight.parts[n] is p for n, p in parts.items()), "a copy goes into the tensors that are there"
    third = _linear()
    third.load_state_dict(state, assign=True)
    _same(third.weight, layer.weight)
    plain = nn.Linear(64, 48)
    third.load_state_dict(plain.state_dict())
    assert torch.equal(dense(third.weight), NormalFloat().round_trip(plain.weight))


def test_dtype_changes_only_what_is_read():
    """`.to(dtype)` changes the logical dtype and keeps every stored byte; back again it is the very same weight."""
    layer = _linear()
    before, parameter = layer.weight.parts, layer.weight
    rounded = dense(layer.weight)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert isinstance(layer.weight, nn.Parameter)
    assert all(torch.equal(p, before[n]) and p.dtype == before[n].dtype for n, p in layer.weight.parts.items())
    assert torch.equal(dense(layer.weight), rounded.bfloat16())
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.float()
    assert torch.equal(dense(layer.weight), rounded)
    assert not layer.weight.requires_grad
    assert parameter.shape == layer.weight.shape
    assert layer.to("meta").weight.parts["codes"].device.type == "meta"


@every_store
def test_copies_and_pickles_stand_alone(store):
    """deepcopy, pickle and torch.save give an equal parameter that shares no byte."""
    layer = _linear(store)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        _same(twin.weight, layer.weight)
        assert isinstance(twin.weight, nn.Parameter)
        assert not twin.weight.requires_grad
        twin.weight.parts["codes"].zero_()
        assert layer.weight.parts["codes"].any()
    bare = layer.weight.detach()
    assert not isinstance(copy.deepcopy(bare), nn.Parameter)
    _same(copy.deepcopy(bare), bare)


def test_deepcopy_keeps_ties():
    """Two names of one packed weight stay one in the copy."""
    model = nn.ModuleDict({"a": nn.Linear(64, 48), "b": nn.Linear(64, 48)})
    model["b"].weight = model["a"].weight
    keep(model, {"a.weight": NormalFloat()})
    assert model["b"].weight is model["a"].weight
    twin = copy.deepcopy(model)
    assert twin["b"].weight is twin["a"].weight


@every_store
@pytest.mark.parametrize("bias", [False, True])
def test_compiles_whole(store, bias):
    """torch.compile without graph breaks, forward and backward, agrees."""
    layer = _linear(store, bias=bias)
    x = torch.randn(3, 64, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    (mine,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.allclose(mine, theirs, rtol=1e-5)


def test_autocast():
    """Inside autocast the product is in bf16, as for a dense layer."""
    layer, x = _linear(), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), layer(x), atol=0.05)


def test_writing_is_refused():
    """In-place arithmetic would be lost: refused by name. `copy_` repacks."""
    weight = _linear().weight
    for write in (lambda: weight.data.add_(1), lambda: weight.data.zero_(), lambda: weight.data.mul_(2)):
        with pytest.raises(StateError, match=r"write into a packed weight \(NormalFloat"):
            write()
    new = torch.randn(48, 64)
    with torch.no_grad():
        weight.copy_(new)
    assert torch.equal(dense(weight), NormalFloat().round_trip(new))


def test_arithmetic_unpacks():
    """Any other operation sees the dense weight."""
    weight = _linear().weight.detach()
    rounded = dense(weight)
    assert torch.equal(weight + 1, rounded + 1)
    assert torch.equal(2 - weight, 2 - rounded)
    assert torch.equal(weight @ weight.T, rounded @ rounded.T)
    assert torch.equal(weight[3:5], rounded[3:5])
    assert torch.equal(torch.linalg.vector_norm(weight, dim=1), torch.linalg.vector_norm(rounded, dim=1))
    assert type(weight + 1) is torch.Tensor


def test_dense_refuses_what_is_no_number():
    with pytest.raises(StateError, match=r"dtype torch\.uint8"):
        dense(torch.zeros(3, dtype=torch.uint8))


def test_keep_reports_what_it_saves():
    """Bytes before and after by hand; tied weights once; unpack undoes the packing."""
    model = nn.ModuleDict(
        {"a": nn.Linear(64, 64), "b": nn.Linear(64, 64, bias=False), "c": nn.Linear(64, 64, bias=False)}
    )
    model["c"].weight = model["b"].weight
    saving = keep(
        model, {"a.weight": NormalFloat(double=False), "b.weight": Uniform(4, 32), "c.weight": Uniform(4, 32)}
    )
    assert (saving.weights, saving.before) == (2 * 64 * 64, 2 * 64 * 64 * 4)
    assert saving.after == 4096 * 4.5 / 8 + 4096 * 6 / 8
    assert saving.bits_per_weight == 5.25
    assert saving.left == 64 * 4
    assert model["c"].weight is model["b"].weight
    rounded = dense(model["b"].weight)
    assert unpack(model) == ["a.weight", "b.weight", "c.weight"]
    assert torch.equal(model["b"].weight, rounded)
    assert model["c"].weight is model["b"].weight
    assert type(model["b"].weight) is nn.Parameter


def test_keep_refuses_before_touching():
    model = nn.Linear(64, 8)
    with pytest.raises(TargetError, match="no parameter 'wieght'; did you mean 'weight'"):
        keep(model, {"weight": NormalFloat(), "wieght": NormalFloat()})
    assert type(model.weight) is nn.Parameter
    keep(model, {"weight": NormalFloat()})
    with pytest.raises(StateError, match="packed already"):
        keep(model, {"weight": NormalFloat()})


@every_store
def test_its_own_dense_values_written_back_change_no_code(store):
    """What a data-parallel wrapper does at its start: the dense values of process 0 go into every process."""
    layer = _linear(store)
    before = copy.deepcopy(layer.weight)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.unpack())
    _same(layer.weight, before)
