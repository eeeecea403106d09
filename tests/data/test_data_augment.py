"""Augmentation: each example's draws depend on (seed, epoch, index) and on nothing else."""

from __future__ import annotations

import dataclasses
from array import array

import pytest
import torch

from rankloom.errors import DataError, StateError
from rankloom.train.data import Batches, Example, Examples, Prepared, Records, Where
from rankloom.train.data.order import generator, keys


def prepared(n=11):
    made = [Example(array("i", range(100 * i, 100 * i + 4 + i % 3)), bytes([0] + [1] * (3 + i % 3)), None, Where("x", i + 1))
            for i in range(n)]  # fmt: skip
    return Prepared(Examples.of(made), Records((), "text", "x", ()), 16, 0, None, 0, 0, ())


def noisy(example, draw):
    """The ids with noise that is 0…99, so the example can still be told by its hundreds."""
    noise = torch.randint(50, (len(example),), generator=draw).tolist()
    return dataclasses.replace(example, ids=array("i", [a + b for a, b in zip(example.ids, noise)]))


def test_generators_differ_and_repeat():
    firsts = {
        (s, e, i): int(torch.randint(2**62, (1,), generator=generator(s, e, i)))
        for s in (0, 1, 2**40, -3)
        for e in range(5)
        for i in range(20)
    }
    assert len(set(firsts.values())) == len(firsts)
    assert int(torch.randint(2**62, (1,), generator=generator(1, 2, 3))) == firsts[1, 2, 3]
    assert torch.randint(2**62, (20,)).tolist() != list(firsts.values())[:20]


def test_draws_are_even_and_unlike_the_order():
    drawn = torch.stack([torch.rand(1, generator=generator(0, 0, i)) for i in range(2000)]).flatten()
    assert abs(drawn.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([drawn, keys(2000, 0).double()]))[0, 1]) < 0.06


@pytest.mark.parametrize("packing", [False, True])
def test_any_order_of_asking_any_ranks_and_a_resume_give_the_same_examples(packing):
    whole = Batches(prepared(), 4, seed=3, packing=packing, augment=noisy)
    steps = range(3 * len(whole))
    straight = [whole.batch_at(s) for s in steps]
    torch.rand(5)
    again = Batches(prepared(), 4, seed=3, packing=packing, augment=noisy)
    backwards = {s: again.batch_at(s) for s in reversed(steps)}
    assert all(torch.equal(straight[s][k], backwards[s][k]) for s in steps for k in straight[s])
    moved = Batches(prepared(), 4, seed=3, packing=packing, augment=noisy)
    moved.restore({**again.state(), "step": len(whole) + 1})
    assert torch.equal(next(iter(moved))["input_ids"], straight[len(whole) + 1]["input_ids"])
    if not packing:
        ranks = [Batches(prepared(), 2, seed=3, rank=r, world=2, augment=noisy) for r in (0, 1)]
        rows = {tuple(row[row > 0].tolist()) for b in ranks for row in b.batch_at(0)["input_ids"]}
        assert rows == {tuple(row[row > 0].tolist()) for row in straight[0]["input_ids"]}


def test_each_epoch_draws_anew_and_the_data_stay_as_they_are():
    data = prepared()
    batches = Batches(data, 11, shuffle=False, augment=noisy)
    one, two = batches.batch_at(0)["input_ids"], batches.batch_at(1)["input_ids"]
    assert not torch.equal(one, two)
    assert data[3].ids.tolist() == [300, 301, 302, 303]
    assert (one // 100 * 100)[3, :4].tolist() == [300] * 4


@pytest.mark.parametrize(("packing", "length", "words"), [(False, 17, "1 to 16"), (True, 5, "1 to 4 are possible with packing"), (False, 0, "made 0 tokens of 4")])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(packing, length, words):
    def wrong(example, draw):
        return dataclasses.replace(example, ids=array("i", [1] * length), trained=b"\1" * length)

    with pytest.raises(DataError, match=rf"x, line 1: augment .*{words}"):
        Batches(prepared(1), 1, packing=packing, augment=wrong).batch_at(0)


def test_a_position_belongs_to_its_augmentation():
    state = Batches(prepared(), 4, augment=noisy).state()
    with pytest.raises(StateError, match="augment='noisy', this run augment=None"):
        Batches(prepared(), 4).restore(state)
