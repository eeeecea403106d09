"""Every thread and task has its own selection."""

import asyncio
import threading

import pytest
import torch
from core_tiny import adapted, nudge, words
from torch import nn

import rankloom as rl

IDS = words(batch=4, tokens=5)


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
            self.gate.wait(timeout=300)
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
    from rankloom.core import selection

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
    assert selection._thread.entries == ()
