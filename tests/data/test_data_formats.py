import pytest

from rankloom.errors import DataError, SettingsError
from rankloom.train.data import Chat, Labelled, Text, detect, load


def turns(record):
    return [(turn.role, turn.content) for turn in record.messages]


HELLO = [("user", "hi"), ("assistant", "yo")]
CASES = [
    ("messages", {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, HELLO),
    ("messages", {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}, HELLO),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": "yo"},
            ]
        },
        HELLO,
    ),
    ("sharegpt", {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, HELLO),
    (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        [("system", "s"), *HELLO],
    ),
    ("alpaca", {"instruction": "hi", "input": "", "output": "yo"}, HELLO),
    ("alpaca", {"instruction": "add", "input": "1 2", "output": "3"}, [("user", "add\n\n1 2"), ("assistant", "3")]),
    ("prompt", {"prompt": "hi", "completion": "yo"}, HELLO),
    ("prompt", {"prompt": "hi", "response": "yo"}, HELLO),
    ("prompt", {"question": "hi", "answer": "yo", "system": "s"}, [("system", "s"), *HELLO]),
]


@pytest.mark.parametrize(("format", "row", "expected"), CASES)
def test_chat_formats(format, row, expected):
    assert detect([row]) == format
    records = load([row])
    assert records.format == format
    assert isinstance(records[0], Chat)
    assert turns(records[0]) == expected
    assert str(records[0].where) == "records, item 1"


def test_text_and_classification():
    assert tuple(load([{"text": "a"}])) == (Text("a", load([{"text": "a"}])[0].where),)
    records = load([{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}, {"text": "c", "label": "pos"}])
    assert records.labels == ("neg", "pos")
    assert [x.label for x in records if isinstance(x, Labelled)] == [1, 0, 1]


@pytest.mark.parametrize(
    ("values", "names", "ids"),
    [
        ([3, 1, 10], ("1", "3", "10"), [1, 0, 2]),
        (["3", "1", "10"], ("1", "3", "10"), [1, 0, 2]),
        (["b", "a", "10"], ("10", "a", "b"), [2, 1, 0]),
    ],
)
def test_label_order(values, names, ids):
    records = load([{"text": "x", "label": value} for value in values])
    assert records.labels == names
    assert [x.label for x in records] == ids


def test_labels_of_the_training_set_hold_for_the_validation_set():
    rows = [{"text": "x", "label": "b"}, {"text": "y", "label": "b"}]
    assert [x.label for x in load(rows, labels=("a", "b"))] == [1, 1]
    assert [x.label for x in load([{"text": "x", "label": 1}], labels=("a", "b"))] == [1]
    with pytest.raises(DataError, match=r"item 1: field 'label' = 'bb' is not a class.*'b'"):
        load([{"text": "x", "label": "bb"}], labels=("a", "b"))
    with pytest.raises(DataError, match=r"= -1 is not a class"):
        load([{"text": "x", "label": -1}], labels=("a", "b"))
    with pytest.raises(SettingsError, match="labels= is for classification"):
        load([{"text": "x"}], labels=("a", "b"))


def test_tools_and_calls_are_kept_for_the_template():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    rows = [
        {
            "messages": [{"role": "user", "content": "x"}, call, {"role": "tool", "content": "7", "name": "f"}],
            "tools": [{"name": "f"}],
        }
    ]
    chat = load(rows)[0]
    assert chat.tools == ({"name": "f"},)
    assert chat.messages[1].message() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f"}}],
    }
    assert chat.messages[2].message() == {"role": "tool", "content": "7", "name": "f"}


def test_columns_rename_and_unused_columns_are_told():
    records = load([{"q": "hi", "a": "yo", "id": 7}], columns={"prompt": "q", "completion": "a"})
    assert turns(records[0]) == HELLO
    assert records.unused == ("id",)
    with pytest.raises(DataError, match=r"item 1: there is no column 'quest'.*did you mean 'question'"):
        load([{"question": "hi", "a": "yo"}], columns={"prompt": "quest"})
    with pytest.raises(SettingsError, match=r"'promt' is not a field.*did you mean 'prompt'"):
        load([{"q": "hi"}], columns={"promt": "q"})


def test_format_forces():
    row = {"prompt": "hi", "completion": "yo", "text": "t"}
    assert load([row]).format == "prompt"
    assert load([row], format="text")[0].text == "t"
    with pytest.raises(SettingsError, match=r"format='alpacca' is unknown; did you mean 'alpaca'"):
        load([row], format="alpacca")
    with pytest.raises(DataError, match=r"item 1: field 'instruction' is missing for format 'alpaca'"):
        load([row], format="alpaca")


def test_null_counts_as_absent():
    rows = [{"prompt": "hi", "completion": "yo", "messages": None}] * 2
    assert detect(rows) == "prompt"
    with pytest.raises(DataError, match=r"item 2: field 'completion' is null for format 'prompt'"):
        detect([rows[0], {"prompt": "hi", "completion": None}])


def test_records_must_agree(write):
    rows = [{"prompt": "a", "completion": "b"}] * 3
    path = write("x.jsonl", [*rows, {"instruction": "a", "output": "b"}])
    with pytest.raises(
        DataError, match=r"line 4: field 'prompt' is missing for format 'prompt'|line 4: this record is 'alpaca'"
    ):
        load(path)
    path = write("y.jsonl", [*rows, {"prompt": "a", "completoin": "b"}, {"x": 1}])
    with pytest.raises(DataError, match=r"y.jsonl, line 4: field 'completion' is missing.*did you mean 'completoin'"):
        load(path)


def test_nothing_fits():
    with pytest.raises(DataError, match=r"the fields 'promt', 'z' fit no format; did you mean 'prompt'.*columns="):
        detect([{"promt": "a", "z": "b"}])
    with pytest.raises(DataError, match="no records"):
        detect([])
    with pytest.raises(DataError, match="item 1: a record must be a mapping of fields, this is a string"):
        load(["text"])


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": 3, "completion": "b"}, "field 'prompt' must be a string, is a number"),
        ({"messages": "x"}, "field 'messages' must be a list, is a string"),
        ({"messages": []}, "field 'messages' is an empty list"),
        ({"messages": [USER, "x"]}, r"field 'messages\[1\]' must be an object, is a string"),
        (
            {"messages": [USER, {"role": "asistant", "content": "y"}]},
            r"messages\[1\].role = 'asistant' is unknown; did you mean 'assistant'",
        ),
        (
            {"messages": [USER, {"rol": "assistant", "content": "y"}]},
            r"messages\[1\].role is missing; did you mean 'rol'",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"messages\[1\].content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\].content\[0\].type = 'image_url'",
        ),
        (
            {"conversations": [{"from": "humann", "value": "x"}]},
            r"conversations\[0\].from = 'humann' is unknown; did you mean 'human'",
        ),
        ({"text": "a", "label": 0.5}, "field 'label' must be a string or a whole number, is a number"),
        ({"text": "a", "label": True}, "is a boolean"),
        ({"text": "a", "label": " "}, "field 'label' is empty"),
        ({"text": "a", "label": "x"}, "every label is 'x'"),
    ],
)
def test_wrong_types_name_the_field(row, said):
    with pytest.raises(DataError, match=said):
        load([row])


def test_labels_of_two_kinds():
    with pytest.raises(DataError, match="item 2: field 'label' is a number, in the first record a string"):
        load([{"text": "a", "label": "x"}, {"text": "a", "label": 1}])


def test_divide_is_disjoint_complete_and_repeatable():
    records = load([{"text": str(i)} for i in range(20)])
    rest, held = records.divide(5, seed=1)
    assert len(held) == 5
    assert sorted([*(x.text for x in rest), *(x.text for x in held)]) == sorted(x.text for x in records)
    again = records.divide(5, seed=1)[1]
    assert list(again) == list(held)
    assert again.digest == held.digest != rest.digest
    assert records.divide(5, seed=2)[1] != held
    with pytest.raises(SettingsError, match="choose 1 to 19"):
        records.divide(20)
