"""Whether an answer is wanted is no class, and no answer is trained that may be unwanted."""

import json

import pytest

from rankloom.errors import DataError
from rankloom.train.data import load

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = {
    "prompt": {"prompt": "q", "completion": "a"},
    "question": {"question": "q", "answer": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("column", "value"), [("label", False), ("label", True), ("desirable", True), ("kto_tag", False), ("label", 0)]
)
def test_a_verdict_beside_an_answer_is_refused(name, column, value):
    rows = [{**ROWS[name], "id": 7}, {**ROWS[name], column: value}]
    with pytest.raises(DataError, match=rf"item 2: field '{column}' = {value!r} beside .* KTO.*delete the column"):
        load(rows)


def test_so_is_one_in_a_table(write):
    with pytest.raises(DataError, match="k.csv, line 3: field 'label' = 'False'"):
        load(write("k.csv", "prompt,completion,label\nq,a,\nq,b,False\n"))


def test_a_verdict_on_a_text_is_no_class_either(write):
    with pytest.raises(
        DataError, match="t.jsonl, line 1: field 'label' must be a string or a whole number, is a boolean"
    ):
        load(write("t.jsonl", [{"text": "x", "label": True}, {"text": "y", "label": False}]))


def test_the_remedy_works():
    assert len(load([ROWS["prompt"]])) == 1
    assert load([{**ROWS["prompt"], "label": "from the web"}]).unused == ("label",)
    assert load([{**ROWS["prompt"], "label": None}]).format == "prompt"


def test_preferences_are_named(write):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match=r"preferences between answers.*columns=\{'completion': 'chosen'\}"):
        load(rows)
    records = load(rows, columns={"completion": "chosen"})
    assert records[0].messages[1].content == "a"


def test_numbers_with_decimals_are_no_classes(write):
    with pytest.raises(DataError, match=r"field 'label' must be a string or a whole number, is a number"):
        load([{"text": "x", "label": 0.5}, {"text": "y", "label": 1.5}])
    file = write("r.csv", "text,label\nx,0.5\ny,1\nz,-2e-3\n")
    with pytest.raises(DataError, match=r"r.csv: field 'label' holds numbers with decimals \(-2e-3, 0.5, 1 …\)"):
        load(file)
    assert load(write("v.csv", "text,label\nx,v0.5\ny,1\n")).labels == ("1", "v0.5")
    assert json.dumps(load(file, labels=["0.5", "1", "-2e-3"]).labels)
