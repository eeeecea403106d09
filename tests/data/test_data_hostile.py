"""Files that are no files, texts that are no texts, and data that would command a terminal."""

import json
import logging
import os

import pytest

from rankloom.errors import DataError, printable
from rankloom.train.data import load, prepare, preview
from rankloom.train.data import read as reading

LONE = "\ud800"
SUFFIXES = ("jsonl", "json", "csv", "tsv", "txt", "parquet")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("what", ["pipe", "device", "link", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, suffix, what):
    path = tmp_path / f"x.{suffix}"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path = tmp_path / "train"
        (path / f"train.{suffix}").mkdir(parents=True)
        with pytest.raises(DataError, match="no data file"):
            load(path)
        path = path / f"train.{suffix}"
        with pytest.raises(DataError, match="is a folder, not a file"):
            reading.read_file(path)
        return
    else:
        path.symlink_to("/dev/zero" if what == "link" else "/dev/full")
    with pytest.raises(DataError, match=rf"x.{suffix}: is a (named pipe|device), not a file of records"):
        load(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_sparse_file_costs_no_memory(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(b"")
    os.truncate(path, 1 << 37)
    with pytest.raises(DataError, match=rf"x.{suffix}.*(NUL|broken Parquet|longer)"):
        load(path)


def test_a_hole_after_good_lines_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    os.truncate(path, 1000)
    with pytest.raises(DataError, match="x.jsonl, line 2: holds NUL bytes"):
        load(path)


@pytest.mark.parametrize(
    ("name", "limit"), [("LINE", "x.jsonl, line 2: longer than 40 bytes"), ("WHOLE", "x.csv: more than 40")]
)
def test_limits(write, monkeypatch, name, limit):
    monkeypatch.setattr(reading, name, 40)
    file = (
        write("x.jsonl", '{"text": "a"}\n{"text": "' + "b" * 50 + '"}\n')
        if name == "LINE"
        else write("x.csv", "text\n" + "a\n" * 30)
    )
    with pytest.raises(DataError, match=limit):
        load(file)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "a", "completion": "b", "n": "@"}, "n"),
        ({"text": "a", "meta": {"ids": [1, "@"]}}, r"meta.ids\[1\]"),
    ],
)
@pytest.mark.parametrize("digits", [5_000, 100_000])
def test_a_number_of_too_many_digits_names_its_field(write, row, field, digits):
    text = json.dumps(row)
    lines = text.replace('"@"', "1") + "\n" + text.replace('"@"', "9" * digits) + "\n"
    with pytest.raises(DataError, match=rf"x.jsonl, line 2: field '{field}' is a number of too many digits"):
        load(write("x.jsonl", lines))
    whole = "[" + lines.strip().replace("\n", ",\n") + "]"
    with pytest.raises(DataError, match=rf"x.json, line 2: field '{field}' is a number of too many digits"):
        load(write("x.json", whole))


USER, BAD = {"role": "user", "content": "q"}, {"role": "assistant", "content": f"a {LONE}"}


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"text": f"ab{LONE}"}, "text"),
        ({"text": "a", "label": LONE}, "label"),
        ({"text": LONE, "label": "a"}, "text"),
        ({"prompt": LONE, "completion": "b"}, "prompt"),
        ({"prompt": "a", "completion": f"{LONE}x"}, "completion"),
        ({"prompt": "a", "completion": "b", "system": LONE}, "system"),
        ({"instruction": "a", "input": LONE, "output": "b"}, "input"),
        ({"messages": [USER, BAD]}, r"messages\[1\].content"),
        ({"messages": [USER, {**BAD, "content": "a", "reasoning_content": LONE}]}, r"messages\[1\].reasoning_content"),
        (
            {"messages": [USER, {**BAD, "content": [{"type": "text", "text": LONE}]}]},
            r"messages\[1\].content\[0\].text",
        ),
        ({"messages": [USER], "tools": [{"function": {"name": LONE}}]}, r"tools\[0\].function.name"),
        ({"conversations": [{"from": "human", "value": LONE}]}, r"conversations\[0\].value"),
    ],
)
def test_half_of_a_surrogate_pair_names_file_line_and_field(write, row, field):
    good = json.loads(json.dumps(row).replace(json.dumps(LONE)[1:-1], "z"))
    file = write("x.jsonl", [good, row])
    with pytest.raises(
        DataError, match=rf"x.jsonl, line 2: field '{field}' holds half of a surrogate pair \(\\ud800\)"
    ):
        load(file)
    with pytest.raises(DataError, match=rf"item 1: field '{field}' holds half"):
        load([row])


def test_whole_pairs_and_unread_columns_are_fine(write, make_tokenizer):
    records = load(write("x.jsonl", r'{"text": "\ud83d\ude00", "note": "\ud800"}' + "\n"))
    assert records[0].text == "😀"
    assert records.digest


@pytest.mark.parametrize("bad", ["\x1b]0;X\x07", "\x9b31m", "a\rb", "\u202eabc", "\x7f"])
def test_nothing_commands_a_terminal(make_tokenizer, bad, caplog):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    with caplog.at_level(logging.WARNING):
        prepared = prepare(load([{"prompt": f"x{bad}y", "completion": bad, f"c{bad}": 1}]), tokenizer)
    shown = [preview(prepared[0], tokenizer), preview(prepared[0], tokenizer, markup=True), str(prepared.summary())]
    with pytest.raises(DataError) as error:
        load([{"text": "x", "label": f"a{bad}"}, {"text": "x", "label": "b"}], labels=["b", "c"])
    for text in [*shown, str(error.value)]:
        assert bad not in text
        assert printable(text) == text
    assert printable("ab\ncd\té") == "ab\ncd\té"
