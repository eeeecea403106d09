import pytest
import torch

from rankloom.errors import DataError, SettingsError, StateError
from rankloom.train.data import Batches, Masking, load, masking, prepare

TEXTS = [{"text": "abcdefghijklmnopqrstuvwxyz"[: 6 + i]} for i in range(20)]


@pytest.fixture
def data(make_tokenizer):
    tokenizer = make_tokenizer(bos="both", mask_token="?")
    return prepare(load(TEXTS), tokenizer, masked=True), masking(tokenizer)


def test_special_tokens_are_never_hidden_and_targets_are_the_text(data):
    prepared, hide = data
    for step in range(20):
        batch = Batches(prepared, 4, masking=hide).batch_at(step)
        plain = {tuple(x.ids) for x in prepared}
        chosen = batch["labels"] != -100
        assert chosen.any(1).all()
        assert not chosen[:, 0].any()
        whole = torch.where(chosen, batch["labels"], batch["input_ids"])
        rows = [tuple(row[: int(m.sum())].tolist()) for row, m in zip(whole, batch["attention_mask"])]
        assert set(rows) <= plain


def test_shares_are_those_of_the_paper(data):
    prepared, hide = data
    chosen = hidden = same = every = 0
    for epoch in range(60):
        batch = Batches(prepared, 20, shuffle=False, masking=hide).batch_at(epoch)
        here = batch["labels"] != -100
        every += int(batch["attention_mask"].sum()) - 2 * 20
        chosen += int(here.sum())
        hidden += int((batch["input_ids"][here] == hide.mask_id).sum())
        same += int((batch["input_ids"][here] == batch["labels"][here]).sum())
    assert chosen / every == pytest.approx(0.16, abs=0.02)
    assert hidden / chosen == pytest.approx(0.8, abs=0.03)
    assert same / chosen == pytest.approx(0.1, abs=0.03)


def test_a_function_of_seed_epoch_and_index(data):
    prepared, hide = data
    one, two = Batches(prepared, 4, seed=3, masking=hide), Batches(prepared, 4, seed=3, masking=hide)
    last = one.batch_at(7)
    assert all(torch.equal(last[k], two.batch_at(7)[k]) for k in last)
    first, second = (Batches(prepared, 20, shuffle=False, masking=hide).batch_at(e)["labels"] for e in (0, 1))
    assert not torch.equal(first, second)
    with pytest.raises(StateError, match="masking"):
        Batches(prepared, 4, seed=3).restore(one.state())


def test_truncation_keeps_the_closing_token(make_tokenizer):
    tokenizer = make_tokenizer(bos="both", mask_token="?")
    prepared = prepare(load(TEXTS[-1:]), tokenizer, masked=True, max_length=8)
    assert list(prepared[0].trained) == [0, 1, 1, 1, 1, 1, 1, 0]
    assert prepared[0].ids[-1] == tokenizer.eos_token_id


def test_refusals(make_tokenizer, data):
    prepared, hide = data
    with pytest.raises(DataError, match="no mask token"):
        masking(make_tokenizer())
    with pytest.raises(SettingsError, match="takes running text; records is 'prompt'"):
        prepare(load([{"prompt": "a", "completion": "b"}]), make_tokenizer(mask_token="?"), masked=True)
    with pytest.raises(SettingsError, match="packing=True needs a causal model"):
        Batches(prepared, 4, packing=True, masking=hide)
    with pytest.raises(SettingsError, match="rate=0"):
        Masking(1, 5, 0)
