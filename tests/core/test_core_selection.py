"""Which are active: several adapters, weights, rows, beams."""

import copy

import pytest
import torch
from core_tiny import adapted, difference, llama, nudge, tokens, tower, words
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError, StateError

IDS = words(batch=4, tokens=5)


def linear(*names):
    """One linear layer, where weights of adapters can be added up by hand."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    bank = None
    for i, name in enumerate(names):
        bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=2), name, target_modules=["0"])
        nudge(bank, name, seed=i)
    x = torch.randn(4, 5, 4, dtype=torch.float64)
    with torch.no_grad(), bank.using():
        base = model(x)
    change = {n: x @ bank.delta(n)["0"].T for n in names}
    return model, bank, x, base, change


@torch.no_grad()
def test_the_first_adapter_speaks_and_later_ones_wait():
    model, bank = adapted("a", "b")
    assert bank.active == {"a": 1.0}
    alone = adapted("a")[0]
    assert torch.equal(model(IDS), alone(IDS))


@torch.no_grad()
def test_weights_as_numbers_add_up():
    model, bank, x, base, change = linear("a", "b")
    bank.use(a=0.7, b=-0.3)
    torch.testing.assert_close(model(x), base + 0.7 * change["a"] - 0.3 * change["b"])
    bank.use("a", b=2)
    torch.testing.assert_close(model(x), base + change["a"] + 2 * change["b"])
    bank.use("b")
    torch.testing.assert_close(model(x), base + change["b"])
    bank.use()
    assert torch.equal(model(x), base)


@torch.no_grad()
def test_weights_as_tensors_by_batch_row_and_token():
    model, bank, x, base, change = linear("a", "b")
    w0, w1, w2 = torch.tensor(0.3), torch.tensor([0.0, 1.0, -2.0, 0.5]), torch.rand(4, 5)
    bank.use(a=w0, b=w1)
    torch.testing.assert_close(model(x), base + w0 * change["a"] + w1.double()[:, None, None] * change["b"])
    bank.use(a=w2)
    torch.testing.assert_close(model(x), base + w2.double()[..., None] * change["a"])


def test_weights_may_be_learned():
    model, bank, x, _, change = linear("a", "b")
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with bank.using(a=weight):
        model(x).sum().backward()
    torch.testing.assert_close(weight.grad, change["a"].sum())


@torch.no_grad()
def test_rows_as_list_and_as_tensor_give_each_row_its_own_adapter():
    model, bank = adapted("a", "b")
    expected = []
    for row, name in zip(IDS, ["b", None, "a", "b"]):
        with bank.using(*[name] if name else []):
            expected.append(model(row[None])[0])
    bank.use(rows=["b", None, "a", "b"])
    listed = model(IDS)
    bank.use("a", "b", rows=torch.tensor([1, -1, 0, 1]))
    indexed = model(IDS)
    for i in range(4):
        assert difference(listed[i], expected[i]) < 1e-12
        assert difference(indexed[i], expected[i]) < 1e-12
    bank.use(rows=torch.tensor([1, -1, 0, 1]))
    assert torch.equal(model(IDS), indexed)


@torch.no_grad()
def test_a_row_without_adapter_is_bitwise_the_base():
    model, bank = adapted("a")
    with bank.using():
        base = model(IDS)
    bank.use(rows=["a", None, "a", None])
    out = model(IDS)
    assert torch.equal(out[1::2], base[1::2])
    assert difference(out[::2], base[::2]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("method", [rl.LoRA(r=2), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=3)], ids=["lora", "dora", "vera"])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 3), torch.randn(4, 4)),
        (nn.Embedding(5, 3), torch.tensor([[0, 1], [2, 3], [4, 4], [1, 0]])),
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(4, 4, 5)),
        (nn.Conv2d(4, 3, 2, padding=1), torch.randn(4, 4, 3, 3)),
    ],
    ids=["linear", "embedding", "conv1d", "conv2d"],
)
def test_rows_on_every_kind_of_layer(method, layer, x):
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    for seed, name in enumerate(("a", "b")):
        bank = rl.attach(model, method, name, target_modules=["layer"])
        nudge(bank, name, seed=seed)
    expected = []
    for row, name in zip(x, ["b", None, "a", "b"]):
        with bank.using(*[name] if name else []):
            expected.append(model["layer"](row[None])[0])
    for selection in ({"rows": ["b", None, "a", "b"]}, {"rows": torch.tensor([1, -1, 0, 1])}):
        with bank.using(**selection):
            torch.testing.assert_close(model["layer"](x), torch.stack(expected))


def test_rows_train_only_the_adapters_of_their_rows():
    model, bank = adapted("a", "b")
    with bank.using(rows=["a", None, None, None]):
        model(IDS).sum().backward()
    assert all(p.grad is not None for _, p, _ in bank.trainable("a"))
    assert all(p.grad is None for _, p, _ in bank.trainable("b"))


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2, 3])
def test_rows_in_generate_with_beams(beams):
    model, bank = adapted("a", "b", model=llama(), target_modules="all-linear", size=0.6)
    ids = tokens(batch=3)
    settings = {"max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = []
    for row, name in zip(ids, ["b", "a", None]):
        with bank.using(*[name] if name else []):
            expected.append(model.generate(row[None], **settings)[0])
    assert len({tuple(e[6:].tolist()) for e in expected}) > 1
    with bank.using(rows=["b", "a", None]):
        assert torch.equal(model.generate(ids, **settings), torch.stack(expected))
    with bank.using("a", "b", rows=torch.tensor([1, 0, -1])):
        assert torch.equal(model.generate(ids, **settings), torch.stack(expected))


class Flattening(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x.flatten(0, 1)).reshape(x.shape)


@pytest.mark.parametrize("selection", [{"rows": ["default", None]}, {"default": torch.tensor([1.0, 0.0])}])
def test_flattened_tokens_are_refused_by_name(selection):
    model = Flattening()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["layer"])
    bank.use(**selection)
    with pytest.raises(StateError, match="'layer' sees 6 rows, the selection has 2"):
        model(torch.randn(2, 3, 4))


def test_a_wrong_batch_and_wrong_tokens_are_refused():
    model, bank, x, *_ = linear("a")
    bank.use(rows=["a", None, "a"])
    with pytest.raises(StateError, match="sees 4 rows, the selection has 3"):
        model(x)
    bank.use(a=torch.rand(4, 7))
    with pytest.raises(StateError, match=r"weights of shape \(4, 7\).*'0' gives \(4, 5, 3\)"):
        model(x)
    bank.use(a=torch.rand(4, 5))
    with pytest.raises(StateError, match="of this very pass"):
        model(x[:, :1])
    bank.use(a=torch.rand(4, 5, 3))
    with pytest.raises(StateError, match="of this very pass"):
        model(x)


@torch.no_grad()
def test_using_is_nested_and_bitwise_the_base():
    model, bank = adapted("a", "b")
    plain = tower()(IDS)
    outputs = {}
    for name in ("a", "b"):
        with bank.using(name):
            outputs[name] = model(IDS)
    with bank.using("b"):
        assert torch.equal(model(IDS), outputs["b"])
        with bank.using():
            assert torch.equal(model(IDS), plain)
            with bank.using("a"):
                assert torch.equal(model(IDS), outputs["a"])
            assert torch.equal(model(IDS), plain)
        assert torch.equal(model(IDS), outputs["b"])
    assert torch.equal(model(IDS), outputs["a"])


@torch.no_grad()
def test_using_ends_with_an_exception():
    _model, bank = adapted("a", "b")
    with pytest.raises(ZeroDivisionError), bank.using("b"):
        1 / 0
    assert bank.active == {"a": 1.0}


@torch.no_grad()
def test_using_of_one_model_leaves_another_alone():
    (one, first), (two, _second) = adapted("a", "b"), adapted("a", "b")
    before = two(IDS)
    with first.using("b"):
        assert torch.equal(two(IDS), before)
        assert difference(one(IDS), before) > 1e-3


def test_unknown_names_are_refused_with_the_nearest():
    _, bank = adapted("poetry", "prose")
    for call in (
        lambda: bank.use("poety"),
        lambda: bank.use(poety=0.5),
        lambda: bank.use(rows=["poety", None]),
        lambda: bank.use("poety", rows=torch.tensor([0])),
        lambda: bank.using("poety").__enter__(),
        lambda: bank.merge("poety"),
        lambda: bank.fold("poety"),
        lambda: bank.reset("poety"),
        lambda: bank.delta("poety"),
        lambda: rl.detach(bank.model, "poety"),
        lambda: list(bank.tensors("poety")),
        lambda: list(bank.trainable("poety")),
        lambda: bank.shared_of("poety"),
    ):
        with pytest.raises(StateError, match="no adapter 'poety' in the bank; did you mean 'poetry'"):
            call()


def test_selections_that_cannot_be():
    _, bank = adapted("a", "b")
    with pytest.raises(SettingsError, match="rows and weights"):
        bank.use(rows=["a"], b=0.5)
    with pytest.raises(SettingsError, match="already names"):
        bank.use("a", rows=["a"])
    for weight in ("0.5", True, None):
        with pytest.raises(SettingsError, match="a weight is a number or a tensor"):
            bank.use(a=weight)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "_x", "x" * 65, "keys", "training", "type", "rows", "context"])
def test_names_that_cannot_be(name):
    model = tower()
    keys = list(model.state_dict())
    with pytest.raises(SettingsError, match="cannot name an adapter"):
        rl.attach(model, rl.LoRA(r=2), name, target_modules=["q_proj"])
    assert list(model.state_dict()) == keys


def test_a_name_is_used_once():
    model, _ = adapted("a")
    with pytest.raises(StateError, match="there is an adapter 'a' already"):
        rl.attach(model, rl.LoRA(r=2), "a", target_modules=["q_proj"])
