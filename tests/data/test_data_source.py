import sys
import types

import pytest

from rankloom.errors import DataError, MissingExtra, SettingsError
from rankloom.train.data import load

ROWS = [{"text": f"t{i}"} for i in range(10)]


def texts(records):
    return [x.text for x in records]


def test_a_folder_is_read_by_split(write, tmp_path):
    write("d/train-00001.jsonl", ROWS[2:4])
    write("d/train-00000.jsonl", ROWS[:2])
    write("d/valid.jsonl", ROWS[4:5])
    write("d/test/part.csv", "text\nx\n")
    write("d/README.md", "about")
    folder = tmp_path / "d"
    assert texts(load(folder)) == ["t0", "t1", "t2", "t3"]
    assert texts(load(str(folder), "validation")) == ["t4"]
    assert texts(load(folder, "test")) == ["x"]
    with pytest.raises(
        DataError, match=r"no data file for split 'extra' \(extra\*\); there is README.md, test, train-"
    ):
        load(folder, "extra")
    write("d/train.csv", "text\nx\n")
    with pytest.raises(DataError, match=r"split 'train' comes as .csv and as .jsonl"):
        load(folder)


def test_a_file_has_no_other_split(write):
    path = write("x.jsonl", ROWS)
    with pytest.raises(DataError, match="a single file has no split 'validation'"):
        load(path, "validation")
    assert len(load(write("valid.jsonl", ROWS), "validation")) == 10


def test_sampling_is_seeded_and_in_order(write):
    path = write("x.jsonl", ROWS)
    drawn = texts(load(f"{path}#4", seed=3))
    assert len(drawn) == 4
    assert drawn == sorted(drawn)
    assert drawn == texts(load(f"{path}#4", seed=3))
    assert len({tuple(texts(load(f"{path}#4", seed=s))) for s in range(8)}) > 1
    with pytest.raises(DataError, match="11 records are asked for, there are 10"):
        load(f"{path}#11")
    with pytest.raises(SettingsError, match="belongs how many records"):
        load(f"{path}#many")


def test_a_file_whose_name_has_the_mark_is_itself(write):
    assert len(load(write("x#3.jsonl", ROWS))) == 10


def test_missing_file_suggests_its_neighbour(write, tmp_path):
    write("train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file or folder; did you mean 'train.jsonl'"):
        load(tmp_path / "tran.jsonl")
    with pytest.raises(DataError, match="no such file or folder"):
        load("no/such/folder/x")


def test_microworld(monkeypatch):
    asked = []

    def examples(task, split, n, seed):
        asked.append((task, split, n, seed))
        if task == "small":
            raise DataError("task 'small' has only 8 different examples in 'train'; ask for n=8")
        return [{"prompt": "p", "completion": "c"}] * n

    monkeypatch.setitem(sys.modules, "rankloom.microworld", types.SimpleNamespace(examples=examples))
    records = load("microworld:copy#7", "validation", seed=5)
    load("microworld:copy")
    assert asked == [("copy", "validation", 7, 5), ("copy", "train", 1000, 0)]
    assert str(records[6].where) == "microworld:copy[validation], example 7"
    with pytest.raises(DataError, match=r"microworld:small#1000: .*ask for n=8; write that number behind '#'"):
        load("microworld:small")
    with pytest.raises(DataError, match="names no task"):
        load("microworld:")


@pytest.fixture
def hub(monkeypatch):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = datasets.Dataset.from_list([{"text": f"t{i}", "label": i % 2} for i in range(10)], features=features)
    asked = []

    def load_dataset(id, subset=None):
        asked.append((id, subset))
        if id == "no/body":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/body' doesn't exist on the Hub")
        return datasets.DatasetDict(train=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_sampling_and_class_names(hub):
    records = load("some/set:small#3", "test", seed=2)
    assert hub == [("some/set", "small")]
    assert records.labels == ("neg", "pos")
    numbers = [int(x.text[1:]) for x in records]
    assert len(numbers) == 3
    assert [x.label for x in records] == [n % 2 for n in numbers]
    assert [str(x.where) for x in records] == [f"some/set:small[test], row {n + 1}" for n in numbers]
    assert list(records) == list(load("some/set:small#3", "test", seed=2))


def test_hub_errors(hub, monkeypatch):
    with pytest.raises(DataError, match=r"there is no split 'tests'; did you mean 'test'"):
        load("some/set", "tests")
    with pytest.raises(DataError, match="99 records are asked for, there are 10"):
        load("some/set#99")
    with pytest.raises(DataError, match=r"'no/body' is no file here.*doesn't exist"):
        load("no/body")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"rankloom\[data\]"):
        load("some/set")
