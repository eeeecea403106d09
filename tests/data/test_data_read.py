import json

import pytest

from rankloom.errors import DataError, MissingExtra
from rankloom.train.data.read import read_file

PAIR = {"prompt": "a", "completion": "b"}


def places(rows):
    return [(row.where.line, dict(row.fields)) for row in rows]


def test_jsonl_passes_over_bom_crlf_and_blank_lines(write):
    path = write("x.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n   \n{"text": "two\xe2\x80\xa8three"}')
    assert places(list(read_file(path))) == [(1, {"text": "one"}), (4, {"text": "two\u2028three"})]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"text": "two"', "broken JSON at column 15"),
        ('["two"]', "a record must be an object {…}, this is a list"),
        ('{"text": "a"} {"text": "b"}', "text after the record"),
        ('{"text": "a", "text": "b"}', "field 'text' is given twice"),
        ('{"a": ' + "[" * 100_000, "JSON nested too deeply"),
        (b'{"text": "\xff"}', "byte 11 is not UTF-8 (0xff)"),
    ],
)
def test_a_broken_jsonl_line_is_named(write, bad, said):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    path = write("x.jsonl", b'{"text": "one"}\n\n' + bad + b"\n")
    with pytest.raises(DataError) as error:
        list(read_file(path))
    assert f"{path}, line 3: " in str(error.value)
    assert said in str(error.value)


def test_a_json_list_knows_the_line_of_each_record(write):
    path = write("x.json", '[\n  {"text": "one"},\n  {"text":\n "two"}, {"text": "three"}\n]\n')
    assert places(list(read_file(path))) == [(2, {"text": "one"}), (3, {"text": "two"}), (4, {"text": "three"})]


def test_a_json_file_may_hold_objects_one_after_the_other(write):
    path = write("x.json", '{"text": "one"}\n{\n"text": "two"\n}\n')
    assert places(list(read_file(path))) == [(1, {"text": "one"}), (2, {"text": "two"})]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ('[\n{"a": 1},\n{"a": }]', 3, "broken JSON at column 7"),
        ('[{"a": 1}\n{"a": 2}]', 1, "no ',' or ']' after this record"),
        ('[{"a": 1},\n 7]', 2, "this is a number"),
        ('"text"', 1, "neither a list of objects"),
        ('[{"a": 1},\n', None, "does not end the file"),
        ('[{"a": 1}] x', None, "does not end the file"),
    ],
)
def test_a_broken_json_list_is_named(write, text, line, said):
    path = write("x.json", text)
    with pytest.raises(DataError) as error:
        list(read_file(path))
    assert said in str(error.value)
    assert line is None or f"{path}, line {line}: " in str(error.value)


def test_csv_counts_lines_inside_quotes(write):
    path = write("x.csv", '\ufeffprompt,completion\r\n"two\nlines","say ""x"", y"\r\n\r\nq,r\r\n')
    assert places(list(read_file(path))) == [
        (2, {"prompt": "two\nlines", "completion": 'say "x", y'}),
        (5, {"prompt": "q", "completion": "r"}),
    ]


def test_tsv(write):
    assert places(read_file(write("x.tsv", "text\tlabel\na, b\tpos\n"))) == [(2, {"text": "a, b", "label": "pos"})]


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("text,label\na,b\na,b,c\n", 3, "3 cells under 2 columns (text, label)"),
        ('text,label\n"a,b\n', 2, "broken table"),
        ("text,text\na,b\n", 1, "column 'text' is given twice"),
        ("text;label\na;b\n", 1, "split by ';', not ','"),
    ],
)
def test_a_broken_table_is_named(write, text, line, said):
    path = write("x.csv", text)
    with pytest.raises(DataError) as error:
        list(read_file(path))
    assert f"{path}, line {line}: " in str(error.value)
    assert said in str(error.value)


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": [{"role": "user", "content": "x"}]}, {"messages": None}]), path)
    rows = list(read_file(path))
    assert rows[0].fields == {"messages": [{"role": "user", "content": "x"}]}
    assert str(rows[1].where) == f"{path}, row 2"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="broken Parquet"):
        list(read_file(path))


def test_parquet_without_pyarrow_names_the_extra(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'rankloom\[data\]'"):
        read_file(write("x.parquet", b""))


def test_a_text_file_is_one_example_per_line(write):
    assert places(read_file(write("x.txt", "one\n\n two \n"))) == [(1, {"text": "one"}), (3, {"text": " two "})]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt"])
def test_an_empty_file_is_an_error(write, name):
    with pytest.raises(DataError, match="holds no records"):
        read_file(write(name, "\n"))


def test_utf16_and_unknown_suffix(write):
    with pytest.raises(DataError, match="UTF-16"):
        read_file(write("x.jsonl", json.dumps(PAIR).encode("utf-16")))
    with pytest.raises(DataError, match=r"no reader for '.xlsx'.*\.jsonl"):
        read_file(write("x.xlsx", "a"))
