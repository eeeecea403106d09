"""Selections where a server needs them: streams in turns, copied contexts, executors, exits in any order."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import rankloom as rl

NAMES = ("t0", "t1", "t2")


@pytest.fixture
def served():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    for name in NAMES:
        bank = rl.attach(model, rl.LoRA(r=2), name=name)
    for _, parameter, _ in (t for name in NAMES for t in bank.tensors(name)):
        nn.init.normal_(parameter)
    x = torch.randn(2, 4)
    answers = {name: bank.bound(name)(x) for name in NAMES}
    assert len({float(a.detach().sum()) for a in answers.values()}) == 3
    bank.use("t0")

    def who(y):
        return next(name for name, answer in answers.items() if torch.equal(y, answer))

    return model, bank, x, who


def stream(model, bank, x, name, count=3):
    with bank.using(name):
        for _ in range(count):
            yield model(x)


def test_streams_in_turns_keep_their_adapter(served):
    model, bank, x, who = served
    a, b = stream(model, bank, x, "t1"), stream(model, bank, x, "t2")
    assert [who(next(s)) for s in (a, b, a, b, b, a)] == ["t1", "t2", "t1", "t2", "t2", "t1"]


@pytest.mark.parametrize("first", [0, 1])
def test_streams_closed_in_any_order_leave_nothing(served, first):
    model, bank, x, who = served
    streams = [stream(model, bank, x, "t1"), stream(model, bank, x, "t2")]
    for each in streams:
        next(each)
    assert who(model(x)) == "t0"
    streams[first].close()
    assert who(next(streams[1 - first])) == ("t2", "t1")[first]
    streams[1 - first].close()
    assert who(model(x)) == "t0"
    assert set(bank.active) == {"t0"}


def test_a_stream_that_is_dropped_leaves_nothing(served):
    model, bank, x, who = served
    half = stream(model, bank, x, "t1")
    next(half)
    del half
    gc.collect()
    assert not bank.selector._frames
    assert not bank.selector._entered
    assert who(model(x)) == "t0"


def test_each_step_in_a_context_of_its_own(served):
    model, bank, x, who = served
    steps = stream(model, bank, x, "t1")
    assert [who(contextvars.copy_context().run(next, steps)) for _ in range(3)] == ["t1"] * 3
    with pytest.raises(StopIteration):
        contextvars.copy_context().run(next, steps)
    assert who(model(x)) == "t0"


def test_blocks_inside_a_stream_and_streams_inside_a_block(served):
    model, bank, x, who = served

    def nested():
        with bank.using("t1"):
            yield model(x)
            with bank.using("t2"):
                yield model(x)
            yield model(x)
            yield bank.bound("t2")(x)
            yield from stream(model, bank, x, "t2", 1)

    with bank.using("t2"):
        steps = nested()
        assert [who(next(steps)) for _ in range(2)] == ["t1", "t2"]
        assert who(model(x)) == "t2"
    assert [who(y) for y in steps] == ["t1", "t2", "t2"]


def test_a_generator_that_makes_a_with_block_is_no_stream(served):
    model, bank, x, who = served

    @contextmanager
    def chosen(name):
        with bank.using(name):
            yield

    with chosen("t1"):
        assert who(model(x)) == "t1"
        with chosen("t2"):
            assert who(model(x)) == "t2"
    assert who(model(x)) == "t0"


def test_async_streams_in_turns(served):
    model, bank, x, who = served

    async def tokens(name):
        with bank.using(name):
            for _ in range(3):
                await asyncio.sleep(0)
                yield model(x)

    async def serve():
        a, b = tokens("t1"), tokens("t2")
        found = [who(await s.__anext__()) for s in (a, b, a, b)]
        await a.aclose()
        found.append(who(await b.__anext__()))
        await b.aclose()
        return found, who(model(x))

    assert asyncio.run(serve()) == (["t1", "t2", "t1", "t2", "t2"], "t0")


def test_tasks_have_selections_of_their_own(served):
    model, bank, x, who = served

    async def request(name):
        with bank.using(name):
            for _ in range(3):
                await asyncio.sleep(0)
                assert who(model(x)) == name

    async def serve():
        await asyncio.gather(*(request(name) for name in NAMES * 2))

    asyncio.run(serve())


def test_bound_travels_to_an_executor_and_a_bare_call_is_told(served):
    model, bank, x, who = served
    with ThreadPoolExecutor(2) as pool, bank.using("t1"):
        assert who(pool.submit(bank.bound("t2"), x).result()) == "t2"
        with pytest.warns(RuntimeWarning, match=r"bank\.bound"):
            assert who(pool.submit(model, x).result()) == "t0"


def test_workers_that_select_for_themselves_are_not_warned(served):
    model, bank, x, who = served
    together = threading.Barrier(2)

    def request(name):
        with bank.using(name):
            together.wait(10)
            return who(model(x))

    with ThreadPoolExecutor(2) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(pool.map(request, ["t1", "t2"])) == ["t1", "t2"]


def test_bound_carries_weights_rows_and_another_call(served):
    model, bank, x, who = served
    bare = bank.bound()(x)
    half = bank.bound(t1=0.5)(x)
    with bank.using(t1=0.5):
        assert torch.equal(half, model(x))
    rows = bank.bound(rows=["t1", None])(x)
    assert torch.equal(rows[1], bare[1])
    assert not torch.equal(rows[0], bare[0])
    assert who(bank.bound("t2", of=lambda y: model(y))(x)) == "t2"


def test_attach_and_detach_of_another_adapter_beside_requests(served):
    model, bank, x, who = served
    faults, stop = [], threading.Event()

    def requests():
        try:
            while not stop.is_set():
                with bank.using("t1"):
                    assert who(model(x)) == "t1"
        except BaseException as error:
            faults.append(error)

    class Other(nn.Module):
        pass

    workers = [threading.Thread(target=requests) for _ in range(2)]
    model.append(nn.Identity())
    for worker in workers:
        worker.start()
    for _ in range(60):
        rl.attach(model, rl.LoRA(r=2), name="passing")
        rl.detach(model, "passing")
    stop.set()
    for worker in workers:
        worker.join(20)
    assert not faults


def test_a_layer_that_loses_its_last_adapter_in_the_middle_of_a_call():
    """The class is looked up, then another thread takes the adapter off: the call ends as the base's."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer)
    rl.attach(model, rl.LoRA(r=1))
    forward = type(layer).forward
    rl.detach(model)
    x = torch.randn(2, 3)
    assert torch.equal(forward(layer, x), layer(x))


def test_only_one_of_two_active_adapters_trains():
    """Trained, active, off: an adapter that takes part without training stays, and so do its rules."""
    model = nn.Sequential(nn.Linear(4, 4))
    bank = rl.attach(model, rl.AdaLoRA(init_r=2, target_r=1), name="old")
    rl.attach(model, rl.LoRA(r=2), name="new")
    bank.use("old", "new")
    bank.train("new")
    assert bank.trained == ("new",)
    before = {k: p.detach().clone() for k, p, _ in bank.tensors("old")}
    batches = [(torch.randn(8, 4), torch.randn(8, 4))]
    rl.fit(model, batches, steps=3)
    assert all(torch.equal(before[k], p) for k, p, _ in bank.tensors("old"))
    bank.train()
    assert bank.trained == ("old", "new")
