"""Who speaks: several adapters, weights, rows, beams, threads and tasks."""

import asyncio
import threading

import pytest
import torch
from core_tiny import difference, llama, nudge, tokens, tower, words
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError, StateError

IDS = words(batch=4, tokens=5)


def adapted(*names, model=None, size=0.3, **plan):
    model = tower() if model is None else model
    plan = {"target_modules": ["q_proj", "v_proj", "embed"]} | plan
    for i, name in enumerate(names):
        bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=3), name, **plan)
        nudge(bank, name, seed=10 + i, size=size)
    return model, bank


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


@pytest.mark.parametrize("count", [2, 8])
def test_threads_get_exactly_their_own_answers(count):
    names = [f"n{i}" for i in range(count)]
    model, bank = adapted(*names)
    with torch.no_grad():
        expected = {}
        for name in names:
            with bank.using(name):
                expected[name] = model(IDS)
    barrier, wrong = threading.Barrier(count), []

    def work(name):
        barrier.wait()
        for _ in range(120 // count):
            with torch.no_grad(), bank.using(name):
                if not torch.equal(model(IDS), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    assert len({float(v.sum()) for v in expected.values()}) == count


def test_threads_inside_one_forward_of_stacked_parameters():
    """The values cached inside a forward belong to the thread that computes them."""

    class Owner(nn.Module):
        def __init__(self, gate):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, 2))
            self.gate = gate

        def forward(self):
            first = self.w
            self.gate.wait(timeout=10)
            return first + self.w

    model = Owner(threading.Barrier(2))
    for i, name in enumerate(("a", "b")):
        bank = rl.attach(model, rl.LoRA(r=1), name, target_modules=[], target_parameters=["w"])
        nudge(bank, name, seed=i)
    delta = {n: bank.delta(n)["w"] for n in ("a", "b")}
    got = {}

    def work(name):
        with torch.no_grad(), bank.using(name):
            got[name] = model()

    threads = [threading.Thread(target=work, args=(name,)) for name in delta]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for name, change in delta.items():
        torch.testing.assert_close(got[name], 2 * change)


def test_use_sets_the_default_of_every_thread():
    _model, bank = adapted("a", "b")
    seen = []
    bank.use("b")
    thread = threading.Thread(target=lambda: seen.append(dict(bank.active)))
    with bank.using("a"):
        thread.start()
        thread.join()
        assert bank.active == {"a": 1.0}
    assert seen == [{"b": 1.0}]
    setter = threading.Thread(target=lambda: bank.use("a", "b"))
    setter.start()
    setter.join()
    assert set(bank.active) == {"a", "b"}


@torch.no_grad()
def test_tasks_that_interleave_keep_their_own_selection():
    model, bank = adapted("a", "b", "c")
    expected = {}
    for name in "abc":
        with bank.using(name):
            expected[name] = model(IDS)
    wrong = []

    async def work(name, naps):
        for nap in naps:
            with bank.using(name):
                await asyncio.sleep(nap)
                if not torch.equal(model(IDS), expected[name]):
                    wrong.append(name)
                await asyncio.sleep(0)
                if bank.active != {name: 1.0}:
                    wrong.append(name)

    async def main():
        await asyncio.gather(work("a", [0, 0.002, 0] * 3), work("b", [0.001, 0] * 4), work("c", [0, 0.003] * 3))

    asyncio.run(main())
    assert wrong == []
    assert bank.active == {"a": 1.0}


def test_interleaved_tasks_leave_nothing_behind_for_compiled_code():
    from rankloom.core import switch

    _, bank = adapted("a", "b")

    async def main():
        go, done = asyncio.Event(), asyncio.Event()

        async def one():
            with bank.using("a"):
                go.set()
                await done.wait()

        async def two():
            await go.wait()
            with bank.using("b"):
                done.set()
                await asyncio.sleep(0.01)

        await asyncio.gather(one(), two())

    asyncio.run(main())
    assert switch._thread.selection == ()


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


def test_selecting_while_merged_is_refused():
    model, bank = adapted("a", "b")
    bank.merge("a")
    for call in (
        lambda: bank.use("b"),
        lambda: bank.using("b").__enter__(),
        lambda: bank.merge("b"),
        lambda: bank.fold("b"),
        lambda: rl.attach(model, rl.LoRA(r=2), "c", target_modules=["q_proj"]),
    ):
        with pytest.raises(StateError, match=r"'a' is merged into the base; unmerge\(\)"):
            call()
    bank.unmerge()
    with pytest.raises(StateError, match="nothing is merged"):
        bank.unmerge()


@torch.no_grad()
def test_merging_inside_a_using_block_does_not_speak_twice():
    model, bank = adapted("a", "b")
    with bank.using("b"):
        out = model(IDS)
        bank.merge()
        assert bank.merged == ("b",)
        assert difference(model(IDS), out) < 1e-12
    assert difference(model(IDS), out) < 1e-12
    bank.unmerge()
    assert bank.active == {"a": 1.0}


def test_merging_rows_is_refused():
    _, bank = adapted("a", "b")
    for selection in ({"rows": ["a", "b"]}, {"a": torch.tensor([0.5, 0.1])}):
        bank.use(**selection)
        with pytest.raises(rl.RankloomError, match="row by row"):
            bank.merge()
    bank.use()
    with pytest.raises(StateError, match="no adapter is active"):
        bank.merge()


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
    model(IDS)
    assert len(calls) == 5
    assert set(map(id, calls)) == {id(a) for _, a in bank.adapters(names[-1])}
