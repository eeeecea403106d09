"""Tables on disk, memory that does not grow with the records, and several sources in ratios."""

import os
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from rankloom.errors import DataError, MissingExtra, SettingsError, StateError
from rankloom.train.data import Batches, load, prepare
from rankloom.train.data import table as tables
from rankloom.train.data.examples import BLOCK

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|a|>' + m['content'] + eos_token }}"
    "{% else %}{{ '<|u|>' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)
KINDS = {
    "text": [{"text": f"text {i}"} for i in range(BLOCK + 7)],
    "chat": [{"prompt": f"q{i}", "completion": f"{i}a"} for i in range(50)],
    "classes": [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(50)],
}
pytest.importorskip("pyarrow")


def made(cache, rows, make_tokenizer, **options):
    return prepare(load(rows), make_tokenizer(CHAT), cache=cache, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_holds_what_memory_holds(tmp_path, make_tokenizer, kind):
    here, there, again = (made(c, KINDS[kind], make_tokenizer) for c in (None, tmp_path, tmp_path))
    assert list(here) == list(there) == list(again)
    assert here.digest == there.digest == again.digest
    assert here.summary() == there.summary() == again.summary()
    assert len(list(tmp_path.iterdir())) == 1
    packing = kind != "classes"
    for step in range(3):
        a, b = (Batches(x, 4, packing=packing).batch_at(step) for x in (here, again))
        assert all(torch.equal(a[k], b[k]) for k in a)
    there.examples.at(len(there) - 1)
    assert str(there.examples.where(len(there) - 1)) == f"records, item {len(KINDS[kind])}"


def test_a_second_start_tokenises_nothing(tmp_path, make_tokenizer, write, monkeypatch):
    file = write("x.jsonl", KINDS["text"])
    tokenizer = make_tokenizer()
    prepare(load(file), tokenizer, cache=tmp_path / "c")
    calls, call = [], type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: calls.append(a[1]) or call(*a, **k))
    prepare(load(file), tokenizer, cache=tmp_path / "c")
    assert calls in ([], [""])


CHANGES = {
    "a record": lambda w: ("y.jsonl", [*KINDS["text"][:-1], {"text": "other"}], {}, {}),
    "max_length": lambda w: ("x.jsonl", KINDS["text"], {"max_length": 4}, {}),
    "the tokenizer": lambda w: ("x.jsonl", KINDS["text"], {}, {"bos": True}),
    "unusable": lambda w: ("x.jsonl", KINDS["text"], {"unusable": "drop"}, {}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_the_result_decides_the_table(tmp_path, make_tokenizer, write, what):
    prepare(load(write("x.jsonl", KINDS["text"])), make_tokenizer(), cache=tmp_path / "c")
    name, rows, options, special = CHANGES[what](write)
    records = load(write(name, rows))
    found = prepare(records, make_tokenizer(**special), cache=tmp_path / "c", **options)
    assert list(found) == list(prepare(records, make_tokenizer(**special), **options))
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_the_rest_and_the_held_out_have_tables_of_their_own(tmp_path, make_tokenizer):
    parts = load(KINDS["chat"]).divide(10, seed=3)
    one, two = (prepare(p, make_tokenizer(CHAT), cache=tmp_path) for p in parts)
    assert (len(one), len(two)) == (40, 10)
    assert {str(x.where) for x in one}.isdisjoint(str(x.where) for x in two)


@pytest.mark.parametrize("harm", ["flip", "cut", "about", "gone"])
def test_a_damaged_table_is_made_again(tmp_path, make_tokenizer, harm):
    good = list(made(tmp_path, KINDS["text"], make_tokenizer))
    [folder] = tmp_path.iterdir()
    file = folder / tables.TABLE
    raw = bytearray(file.read_bytes())
    if harm == "flip":
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    elif harm == "cut":
        file.write_bytes(raw[:-100])
    elif harm == "about":
        (folder / tables.ABOUT).write_text("{")
    else:
        file.unlink()
    assert list(made(tmp_path, KINDS["text"], make_tokenizer)) == good


def test_an_error_leaves_no_table(tmp_path, make_tokenizer):
    rows = [*KINDS["text"], {"text": " "}]
    with pytest.raises(DataError, match=f"item {len(rows)}: nothing to train"):
        made(tmp_path, rows, make_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_without_pyarrow_memory_serves_and_the_extra_is_named(tmp_path, make_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert not tables.available()
    assert len(made(None, KINDS["chat"], make_tokenizer)) == 50
    with pytest.raises(MissingExtra, match=r"rankloom\[data\]"):
        made(tmp_path, KINDS["chat"], make_tokenizer)


def kept(file, cache, tokenizer):
    """Bytes that records, prepared data and batches of a file hold on to."""
    tracemalloc.start()
    prepared = prepare(load(file), tokenizer, cache=cache)
    batches = Batches(prepared, 4, packing=True)
    batches.batch_at(0)
    found = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return found


def test_memory_hardly_grows_with_the_records(tmp_path, make_tokenizer, write):
    tokenizer = make_tokenizer(CHAT)
    sizes = [BLOCK, 3 * BLOCK]
    files = [write(f"{n}.jsonl", [{"prompt": f"q {i} " * 5, "completion": f"{i}"} for i in range(n)]) for n in sizes]
    kept(files[0], tmp_path / "warm", tokenizer)
    few, many = (kept(file, tmp_path / f"c{i}", tokenizer) for i, file in enumerate(files))
    assert (many - few) / (sizes[1] - sizes[0]) < 150


def test_the_cache_of_a_run(tmp_path, make_tokenizer, monkeypatch):
    from rankloom.jobs import rundata
    from rankloom.train.config import DataSettings

    monkeypatch.setenv("RANKLOOM_CACHE", str(tmp_path / "own"))
    records = load(KINDS["text"])
    rundata.prepared(records, make_tokenizer(), DataSettings("x"))
    assert not (tmp_path / "own").exists()
    monkeypatch.setattr(rundata, "MANY", 1000)
    rundata.prepared(records, make_tokenizer(), DataSettings("x", cache="off"))
    assert not (tmp_path / "own").exists()
    rundata.prepared(records, make_tokenizer(), DataSettings("x"))
    assert len(list((tmp_path / "own").iterdir())) == 1
    rundata.prepared(load(KINDS["chat"]), make_tokenizer(), DataSettings("x", cache=str(tmp_path / "named")))
    assert len(list((tmp_path / "named").iterdir())) == 1


def test_parquet_is_read_group_by_group(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file, n = tmp_path / "x.parquet", 2500
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(n)]}), file, row_group_size=1100)
    records = load(file)
    assert [x.text for x in records] == [f"t{i}" for i in range(n)]
    assert (records[1099].text, records[1100].text, records[-1].text) == ("t1099", "t1100", "t2499")
    assert str(records[1100].where) == f"{file}, row 1101"
    rest, held = records.divide(100, seed=1)
    assert sorted(int(x.text[1:]) for part in (rest, held) for x in part) == list(range(n))


# Several sources.


def sources(write, counts, kind="text"):
    made = {}
    for name, n in counts.items():
        made[str(write(f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(n)]))] = 1
    return list(made)


def drawn(batches, epoch):
    """How often each record comes in an epoch."""
    steps = range(epoch * len(batches), (epoch + 1) * len(batches))
    return Counter(str(where) for step in steps for where in batches.sources_at(step))


def by_source(found):
    return Counter(os.path.basename(place)[0] for place in found.elements())


@pytest.mark.parametrize(
    ("ratios", "epoch"), [((3, 1), (60, 20)), ((1, 1), (40, 40)), ((60, 40), (60, 40)), ((1, 19), (2, 40))]
)
def test_an_epoch_has_the_ratios(write, make_tokenizer, ratios, epoch):
    names = sources(write, {"a": 60, "b": 40})
    prepared = prepare(load(dict(zip(names, ratios))), make_tokenizer())
    batches = Batches(prepared, 4, seed=5)
    for number in range(4):
        found = drawn(batches, number)
        assert max(found.values()) == 1 or (max(found.values()) == 2 and number)
        assert by_source(found) == dict(zip("ab", epoch))


def test_a_source_goes_on_where_it_stood(write, make_tokenizer):
    names = sources(write, {"a": 90, "b": 30})
    batches = Batches(prepare(load({names[0]: 1, names[1]: 1}), make_tokenizer()), 4, seed=5)
    seen = sum((drawn(batches, e) for e in range(3)), Counter())
    assert {n for place, n in seen.items() if "a.jsonl" in place} == {1}
    assert len([p for p in seen if "a.jsonl" in p]) == 90
    assert [drawn(batches, 0), drawn(batches, 1)] == [drawn(batches, e) for e in (0, 1)]
    assert drawn(batches, 0) != drawn(batches, 3)


def test_packed_rows_hold_one_source_each(write, make_tokenizer):
    names = sources(write, {"a": 60, "b": 40})
    prepared = prepare(load({names[0]: 2, names[1]: 1}), make_tokenizer(), max_length=16)
    batches = Batches(prepared, 1, packing=True)
    kinds = Counter()
    for step in range(len(batches)):
        [kind] = {os.path.basename(w.file)[0] for w in batches.sources_at(step)}
        kinds[kind] += 1
    assert kinds["a"] == pytest.approx(2 * kinds["b"], abs=1)


def test_resume_knows_the_ratios(write, make_tokenizer):
    names = sources(write, {"a": 60, "b": 40})
    one, two = (Batches(prepare(load({names[0]: r, names[1]: 1}), make_tokenizer()), 4) for r in (1, 2))
    with pytest.raises(StateError, match="ratios|steps_per_epoch"):
        two.restore(one.state())


def test_sources_that_do_not_fit(write, make_tokenizer):
    text, other = sources(write, {"a": 5, "b": 5})
    chat = write("c.jsonl", KINDS["chat"])
    for given, said in [
        ({text: 1, str(chat): 1}, "do not train together: .*'text'.*'prompt'"),
        ({text: 0, other: 1}, "the ratio of .* is 0: a positive number"),
        ({text: float("nan"), other: 1}, "positive number"),
        ({}, "source is empty"),
    ]:
        with pytest.raises(SettingsError, match=said):
            load(given)
    with pytest.raises(DataError, match="leave one of them out"):
        Batches(prepare(load({text: 1, other: 1000}), make_tokenizer()), 1)


def test_classes_of_several_sources_are_one_list(write):
    a = write("a.jsonl", [{"text": "x", "label": "m"}, {"text": "y", "label": "z"}])
    b = write("b.jsonl", [{"text": "x", "label": "c"}, {"text": "y", "label": "z"}])
    records = load({str(a): 1, str(b): 1})
    assert records.labels == ("c", "m", "z")
    assert [x.label for x in records] == [1, 2, 0, 2]
    rest, held = records.divide(1, seed=0)
    assert sum(rest.parts) == 3
    assert sum(held.parts) == 1


def test_hub_rows_are_a_mapped_table(monkeypatch, make_tokenizer):
    import datasets

    from rankloom.hf.datasets import read

    table = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(1500)], "label": [i % 2 for i in range(1500)]})
    table = table.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.DatasetDict({"train": table}))
    rows, names = read("some/set", None, "train", 1200, 0)
    assert (len(rows), names) == (1200, ("neg", "pos"))
    assert [row.fields["text"] for row in rows] == [f"t{row.where.line - 1}" for row in rows]
    records = load("some/set#1200", classes=["pos", "neg"])
    assert records.labels == ("pos", "neg")
    assert {(x.where.line - 1) % 2 == 1 - x.label for x in records} == {True}


def test_order_and_rows_cost_a_few_bytes_a_record():
    from rankloom.train.data.packing import best_fit

    rows = best_fit(np.full(100_000, 7), 1024)
    assert rows.items.nbytes + rows.ends.nbytes < 9 * 100_000
    assert len(rows) == -(-100_000 // 146)
