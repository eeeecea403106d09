import json
import subprocess
import sys
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from rankloom.errors import DataError, SettingsError, StateError
from rankloom.train.data import Batches, Example, Examples, Prepared, Records, Where, load, prepare
from rankloom.train.data.order import draw, keys, permutation
from rankloom.train.data.packing import best_fit

MASK = (1 << 64) - 1


def prepared_of(lengths, max_length=32, labels=()):
    """Examples with ids that occur nowhere else; the second half of each is trained."""
    examples, at = [], 1
    for n, length in enumerate(lengths):
        trained = bytes(int(i >= max(1, length // 2)) for i in range(length))
        label = n % len(labels) if labels else None
        examples.append(
            Example(array("i", range(at, at + length)), b"" if labels else trained, label, Where("x", n + 1))
        )
        at += length
    return Prepared(Examples.of(examples), Records((), "text", "x", labels), max_length, 0, None, 0, 0, ())


def test_a_batch_by_hand():
    batch = Batches(prepared_of([3, 5]), 2, shuffle=False).batch_at(0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [4, 5, 6, 7, 8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, *[-100] * 5], [-100, -100, 6, 7, 8, *[-100] * 3]]
    assert {x.dtype for x in batch.values()} == {torch.int64}


def test_padding_stays_within_max_length():
    assert Batches(prepared_of([9], max_length=12), 1).batch_at(0)["input_ids"].shape == (1, 12)
    assert Batches(prepared_of([9]), 1, pad_to_multiple_of=4).batch_at(0)["input_ids"].shape == (1, 12)
    assert Batches(prepared_of([9]), 1, pad_to_multiple_of=1).batch_at(0)["input_ids"].shape == (1, 9)


def test_classification_batch():
    batch = Batches(prepared_of([2, 3, 2], labels=("a", "b")), 3, shuffle=False).batch_at(0)
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["attention_mask"].sum().item() == 7
    with pytest.raises(SettingsError, match="one label per token"):
        Batches(prepared_of([2, 3], labels=("a", "b")), 1, packing=True)


def test_a_packed_batch_by_hand():
    batches = Batches(prepared_of([4, 7, 3], max_length=8), 2, shuffle=False, packing=True)
    assert list(batches.rows) == [(0, 2), (1,)]
    batch = batches.batch_at(0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 12, 13, 14, 0], [5, 6, 7, 8, 9, 10, 11, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3, 4, -100, 13, 14, -100], [-100, -100, -100, 8, 9, 10, 11, -100]]
    assert "attention_mask" not in batch


def test_packed_loss_equals_the_unpacked_one_where_attention_honours_positions():
    model = tiny.llama(vocab_size=64).eval()
    model.config.use_cache = False
    data = prepared_of([5, 9, 4, 6], max_length=16)
    with torch.no_grad():
        packed = Batches(data, 2, packing=True, shuffle=False).batch_at(0)
        loose = Batches(data, 4, shuffle=False).batch_at(0)
        assert len(packed["input_ids"]) == 2
        assert torch.allclose(model(**packed).loss, model(**loose).loss, atol=1e-6)
        crossing = model(**packed, attention_mask=torch.ones_like(packed["input_ids"])).loss
        assert not torch.allclose(crossing, model(**loose).loss, atol=1e-4)


def test_best_fit_by_hand():
    assert list(best_fit([5, 4, 3, 5, 2, 1], 8)) == [(0, 2), (1,), (3, 4, 5)]
    assert list(best_fit([8], 8)) == [(0,)]


def splitmix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_keys_are_splitmix_in_exact_arithmetic():
    golden, seed, epoch = 0x9E3779B97F4A7C15, 11, 3
    stream = splitmix((splitmix((seed + golden) & MASK) + (epoch + 1) * golden) & MASK)
    expected = [splitmix((stream + (i + 1) * golden) & MASK) for i in range(5)]
    assert [k & MASK for k in keys(5, seed, epoch).tolist()] == expected


def test_order_depends_on_seed_and_epoch_alone():
    orders = {(s, e): tuple(permutation(50, s, e).tolist()) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    torch.manual_seed(123)
    assert tuple(permutation(50, 1, 2).tolist()) == orders[1, 2]
    assert draw(50, 5, 0).tolist() == sorted(orders[0, 0][:5])


def test_every_place_is_equally_likely():
    counts = torch.zeros(4, 4)
    for seed in range(2000):
        for place, index in enumerate(permutation(4, seed).tolist()):
            counts[place, index] += 1
    assert (counts / 2000 - 0.25).abs().max() < 0.04


def test_order_is_the_same_in_another_process():
    code = "from rankloom.train.data.order import permutation; print(permutation(20, 7, 2).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=500).stdout
    assert json.loads(out) == permutation(20, 7, 2).tolist()


def test_epochs_follow_each_other():
    batches = Batches(prepared_of([3] * 7), 2, seed=4)
    assert len(batches) == 4
    first, second = [b["input_ids"].tolist() for b in batches], [b["input_ids"].tolist() for b in batches]
    assert first != second
    assert sorted(row for b in first for row in b) == sorted(row for b in second for row in b)
    assert batches.epoch == 2
    assert [batches.batch_at(i)["input_ids"].tolist() for i in range(8)] == first + second
    assert [w.line for w in batches.sources_at(0)] == [(row[0] - 1) // 3 + 1 for row in first[0]]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    packing=st.booleans(),
    stop=st.integers(0, 40),
)
def test_restore_gives_the_same_remaining_batches(lengths, batch_size, seed, packing, stop):
    data = prepared_of(lengths, max_length=16)
    running = Batches(data, batch_size, seed, packing=packing)
    steps = 3 * len(running)
    for _ in range(3):
        for _ in running:
            if running.step >= stop:
                break
        if running.step >= stop:
            break
    state = json.loads(json.dumps(running.state()))
    resumed = Batches(data, batch_size, seed, packing=packing)
    resumed.restore(state)
    assert resumed.epoch == running.epoch
    while resumed.step < steps:
        for left, right in zip(running, resumed, strict=True):
            assert same(left, right)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 5),
    world=st.integers(1, 5),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)
def test_shards_are_disjoint_complete_and_equally_long(n, batch_size, world, seed, epoch):
    data = prepared_of([2] * n)
    if n < world:
        with pytest.raises(DataError, match="too few"):
            Batches(data, batch_size, seed, world=world)
        return
    ranks = [Batches(data, batch_size, seed, rank=r, world=world) for r in range(world)]
    steps = {len(b) for b in ranks}
    assert len(steps) == 1
    seen, start = [], epoch * steps.pop()
    for batches in ranks:
        for step in range(start, start + len(batches)):
            lines = [w.line for w in batches.sources_at(step)]
            assert 1 <= len(lines) <= batch_size + (step == start + len(batches) - 1)
            seen += lines
    assert sorted(seen) == list(range(1, n + 1))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    capacity=st.integers(12, 30),
    batch_size=st.integers(1, 3),
)
def test_packing_loses_no_trained_token(lengths, capacity, batch_size):
    data = prepared_of(lengths, max_length=capacity)
    wanted = sorted(i for x in data for i, flag in zip(x.ids, x.trained) if flag)
    got, whole = [], []
    for batch in Batches(data, batch_size, 0, packing=True):
        assert batch["input_ids"].shape[1] <= capacity
        got += batch["labels"][batch["labels"] != -100].tolist()
        whole += batch["input_ids"][batch["input_ids"] != 0].tolist()
        shifted = batch["labels"][:, 1:] != -100
        assert bool((batch["position_ids"][:, 1:][shifted] == batch["position_ids"][:, :-1][shifted] + 1).all())
        assert bool((batch["input_ids"][:, 1:][shifted] == batch["input_ids"][:, :-1][shifted] + 1).all())
    assert sorted(got) == wanted
    assert sorted(whole) == sorted(i for x in data for i in x.ids)
    rows = list(best_fit(lengths, capacity))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(sums[a] + lengths[rows[b][0]] > capacity for b in range(len(rows)) for a in range(b))


def test_drop_last():
    batches = Batches(prepared_of([2] * 7), 2, drop_last=True)
    assert len(batches) == 3
    assert [len(b["input_ids"]) for b in batches] == [2, 2, 2]
    with pytest.raises(DataError, match="give 8 or more"):
        Batches(prepared_of([2] * 7), 8, drop_last=True)


def test_a_foreign_position_is_refused():
    state = Batches(prepared_of([3] * 7), 2, seed=4).state()
    for other in (
        Batches(prepared_of([3] * 7), 3, seed=4),
        Batches(prepared_of([3] * 7), 2, seed=5),
        Batches(prepared_of([3] * 6 + [4]), 2, seed=4),
        Batches(prepared_of([3] * 7), 2, seed=4, packing=True),
    ):
        with pytest.raises(
            StateError, match=r"the saved data position has (rows_per_step|steps_per_epoch|seed|digest|packing)="
        ):
            other.restore(state)


def test_settings_are_checked():
    with pytest.raises(SettingsError, match="batch_size=0"):
        Batches(prepared_of([2]), 0)
    with pytest.raises(SettingsError, match="rank=2 is not one of the 2 ranks"):
        Batches(prepared_of([2]), 1, rank=2, world=2)


def test_from_file_to_batch(write, make_tokenizer):
    template = "{% for m in messages %}{{ '<|u|>' if m['role'] == 'user' else '<|a|>' }}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    path = write("train.jsonl", [{"prompt": f"{i}", "completion": "x"} for i in range(5)])
    prepared = prepare(load(path), make_tokenizer(template))
    batches = Batches(prepared, 2)
    assert sum(len(b["input_ids"]) for b in batches) == 5
    assert str(batches.sources_at(0)[0]).startswith(f"{path}, line ")
