import json
import logging

import pytest

from rankloom.errors import DataError, SettingsError
from rankloom.train.data import load, prepare, preview

CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|a|>' + m['content'] + eos_token }}"
    "{% else %}{{ '<|u|>' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)
PAIRS = [
    {"prompt": "ab", "completion": "cd"},
    {"prompt": "abcdefgh", "completion": "i"},
    {"prompt": "a", "completion": "bcdefgh"},
]


def test_text_has_bos_and_a_trained_eos(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    prepared = prepare(load([{"text": "ab"}]), tokenizer)
    assert list(prepared[0].ids) == tokenizer.convert_tokens_to_ids(["<s>", "a", "b", "</s>"])
    assert list(prepared[0].trained) == [0, 1, 1, 1]
    plain = prepare(load([{"text": "ab"}]), make_tokenizer())
    assert list(plain[0].ids) == tokenizer.convert_tokens_to_ids(["a", "b", "</s>"])


def test_classification_is_encoded_as_the_tokenizer_does(make_tokenizer):
    tokenizer = make_tokenizer(bos="both")
    prepared = prepare(load([{"text": "ab", "label": "x"}, {"text": "abcdef", "label": "y"}]), tokenizer, max_length=5)
    assert list(prepared[0].ids) == tokenizer.convert_tokens_to_ids(["<s>", "a", "b", "</s>"])
    assert list(prepared[1].ids) == tokenizer.convert_tokens_to_ids(["<s>", "a", "b", "c", "</s>"])
    assert [x.label for x in prepared] == [0, 1]
    assert prepared.truncated == 1


def test_truncation_is_counted_and_a_lost_answer_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer(CHAT)
    with pytest.raises(
        DataError, match=r"item 2: the answer is wholly cut: it begins at token 11 of 12, max_length is 8"
    ):
        prepare(load(PAIRS), tokenizer, max_length=8)
    prepared = prepare(load(PAIRS), tokenizer, max_length=8, unusable="drop")
    summary = prepared.summary()
    assert (summary.n, summary.truncated, summary.dropped, summary.longest) == (2, 2, 1, 8)
    assert (summary.tokens, summary.trained) == (7 + 8, 3 + 5)
    assert [str(x.where) for x in prepared] == ["records, item 1", "records, item 3"]
    with pytest.raises(DataError, match="no example has a token to train within max_length=2"):
        prepare(load(PAIRS), tokenizer, max_length=2, unusable="drop")


def test_nothing_to_train(make_tokenizer):
    tokenizer = make_tokenizer(CHAT)
    with pytest.raises(DataError, match="item 1: nothing to train: no assistant turn"):
        prepare(load([{"messages": [{"role": "user", "content": "x"}]}]), tokenizer)
    with pytest.raises(DataError, match="item 2: nothing to train"):
        prepare(load([{"text": "x"}, {"text": " "}]), tokenizer)
    assert prepare(load([{"text": "x"}, {"text": " "}]), tokenizer, unusable="drop").dropped == 1


def test_settings(make_tokenizer):
    tokenizer = make_tokenizer(CHAT)
    for arguments, said in [
        ({"train_on": "asistant"}, "did you mean 'assistant'"),
        ({"unusable": "dropp"}, "did you mean 'drop'"),
        ({"max_length": 1}, "leaves no token"),
    ]:
        with pytest.raises(SettingsError, match=said):
            prepare(load(PAIRS), tokenizer, **arguments)


def test_the_tokenizers_own_limit_holds(make_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    prepared = prepare(load([{"text": "abcdefgh"}]), make_tokenizer(model_max_length=6))
    assert prepared.max_length == 6
    assert len(prepared[0]) == 6
    assert any("lowered to 6" in note for note in prepared.notes)
    assert "indexing errors" not in caplog.text


def test_padding_token(make_tokenizer, caplog):
    with caplog.at_level(logging.WARNING, "rankloom.data"):
        prepared = prepare(load([{"text": "ab"}]), make_tokenizer(omit=("pad_token",)))
    assert prepared.pad_id == 2
    assert any("EOS '</s>' (id 2) pads instead" in note for note in prepared.notes)
    assert "pads instead" in caplog.text
    assert list(prepared[0].trained) == [0, 1, 1]
    with pytest.raises(DataError, match=r"neither a pad token nor an EOS.*tokenizer.pad_token ="):
        prepare(load([{"text": "ab"}]), make_tokenizer(omit=("pad_token", "eos_token")))


def test_slow_tokenizer_is_refused(make_tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="Slow is a slow tokenizer"):
        prepare(load(PAIRS), Slow())


def test_summary_is_text_and_json(make_tokenizer):
    summary = prepare(load([{**PAIRS[0], "id": 1}]), make_tokenizer(CHAT)).summary()
    assert str(summary) == (
        "records: 1 examples (prompt), 7 tokens, 3 trained\n"
        "longest 7 of at most 1024; 0 truncated, 0 dropped\ncolumns not used: id"
    )
    assert json.loads(json.dumps(summary.as_dict()))["longest"] == 7


def test_digest_sees_every_part(make_tokenizer):
    tokenizer = make_tokenizer(CHAT)
    rows = [*PAIRS]
    same = prepare(load(rows), tokenizer).digest
    assert same == prepare(load(rows), tokenizer).digest
    assert same != prepare(load(rows[::-1]), tokenizer).digest
    assert same != prepare(load(rows), tokenizer, train_on="all").digest
    labelled = [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}]
    assert prepare(load(labelled), tokenizer).digest != prepare(load(labelled[::-1]), tokenizer).digest


def test_preview(make_tokenizer):
    tokenizer = make_tokenizer(CHAT)
    example = prepare(load([{"prompt": "a[b]", "completion": "c"}]), tokenizer)[0]
    assert preview(example, tokenizer) == "records, item 1: 8 tokens, 2 trained\n[-<|u|>a[b]<|a|>-]{+c</s>+}"
    marked = preview(example, tokenizer, markup=True)
    assert marked.endswith("[dim]<|u|>a\\[b]<|a|>[/][bold green]c</s>[/]")
    from rich.text import Text

    assert Text.from_markup(marked).plain.endswith("\n<|u|>a[b]<|a|>c</s>")


def test_preview_of_a_class(make_tokenizer):
    tokenizer = make_tokenizer()
    prepared = prepare(load([{"text": "ab", "label": "x"}, {"text": "c", "label": "y"}]), tokenizer)
    assert preview(prepared[1], tokenizer, labels=prepared.labels) == "records, item 2: 1 tokens, class 1 (y)\nc"
