"""A classifier's own class names are honoured; masked models train as such; data named for `eval` are judged whole."""

import json

import pytest
import torch
from cli_tiny import byte_tokenizer
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

WORDS = ["cat", "cow", "hen", "car", "pen", "mug"]
NAMES = {0: "none", 1: "animal"}  # against the alphabet


def bert(labels=NAMES, **names):
    config = BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0, num_labels=len(labels), **names,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config)


def truth(word):
    return int(word in WORDS[:3])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier that is right about every word, trained without this library."""
    tokenizer = byte_tokenizer(eos_token="<e>", pad_token="<p>")
    model = bert(id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    coded = tokenizer(WORDS, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = torch.tensor([truth(w) for w in WORDS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        model(**coded, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.eval()(**coded).logits.argmax(-1) == labels).all()

    def save(name, **config):
        folder = tmp_path_factory.mktemp("models") / name
        for key, value in config.items():
            setattr(model.config, key, value)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        for key, value in config.items():
            if value is None:
                written.pop(key, None)
        (folder / "config.json").write_text(json.dumps(written))
        return folder

    return save


@pytest.fixture
def table(tmp_path):
    def table(name, label, words=WORDS * 4):
        file = tmp_path / name
        file.write_text("".join(json.dumps({"text": w, "label": label(w)}) + "\n" for w in words))
        return file

    return table


def accuracy(run, model, data, *more):
    found = run("eval", f"model={model}", f"data={data}", *more, "--json")
    assert found.code == 0, found.err
    return found.json["base"]["accuracy"]


@pytest.mark.parametrize("how", ["both", "id2label", "label2id"])
def test_labels_by_name_and_by_number_mean_what_the_model_says(run, trained, table, how):
    by_name = {v: k for k, v in NAMES.items()}
    written = {"id2label": NAMES if how != "label2id" else None, "label2id": by_name if how != "id2label" else None}
    model = trained("bert", **written)
    assert accuracy(run, model, table("names.jsonl", lambda w: NAMES[truth(w)])) == 1
    assert accuracy(run, model, table("numbers.jsonl", truth)) == 1
    assert accuracy(run, model, table("digits.jsonl", lambda w: str(truth(w)))) == 1
    assert accuracy(run, model, table("one.jsonl", lambda w: "none", WORDS[3:])) == 1


def test_training_keeps_what_the_model_knows(run, trained, table, tmp_path):
    model, data = trained("bert", id2label=NAMES), table("cls.jsonl", lambda w: NAMES[truth(w)])
    found = run(
        "train", f"model={model}", f"data={data}", f"out={tmp_path / 'o'}", "steps=2", "lr=1e-5", "r=2", "--json"
    )
    assert found.code == 0, found.err
    assert found.json["before"]["accuracy"] == found.json["after"]["accuracy"] == 1
    again = run("eval", tmp_path / "o", f"data={data}", "--json")
    assert again.json["adapter"]["accuracy"] == 1
    assert again.json["adapter"]["examples"] == 24


@pytest.mark.parametrize("command", ["eval", "plan", "train"])
def test_classes_that_do_not_fit_are_refused_by_names_and_counts(run, trained, table, tmp_path, command):
    model = trained("bert", id2label=NAMES)
    data = table("cls.jsonl", lambda w: ["thing", "animal"][truth(w)])
    found = run(command, f"model={model}", f"data={data}", *([f"out={tmp_path / 'o'}"] if command == "train" else []))
    assert found.code != 0
    for part in (
        "'thing' is not a class",
        "the data has 2 (animal, thing)",
        "2 classes (none, animal)",
        "model.head=new",
    ):
        assert part in found.err
    three = table("three.jsonl", lambda w: ["x", "y", "z"][len(w) and WORDS.index(w) % 3])
    found = run(command, f"model={model}", f"data={three}", "data.labels=[x,y,z]", f"out={tmp_path / 'p'}")
    assert "2 classes (none, animal), the data has 3 classes (x, y, z)" in found.err


def test_both_remedies_work(run, trained, table, tmp_path):
    model = trained("bert", id2label=NAMES)
    own = table("own.jsonl", lambda w: ["thing", "being"][truth(w)])
    assert accuracy(run, model, own, "data.labels=[thing,being]") == 1
    moved = table("moved.jsonl", lambda w: NAMES[truth(w)])
    assert "in this order" in run("eval", f"model={model}", f"data={moved}", "data.labels=[animal,none]").err
    mixed = table("mixed.jsonl", lambda w: ["thing", "animal"][truth(w)])
    assert "in this order" in run("eval", f"model={model}", f"data={mixed}", "data.labels=[thing,animal]").err
    three = table("three.jsonl", lambda w: ["x", "y", "z"][WORDS.index(w) % 3])
    found = run(
        "train",
        f"model={model}",
        f"data={three}",
        f"out={tmp_path / 'o'}",
        "model.head=new",
        "steps=3",
        "r=2",
        "--json",
    )
    assert found.code == 0, found.err
    assert found.json["before"]["accuracy"] < 1
    assert any("head=new: classifier starts at random" in note for note in found.json["notes"])
    assert run("eval", tmp_path / "o", "--json").json["adapter"]["loss"] == pytest.approx(found.json["after"]["loss"])


def test_a_new_head_of_the_same_size_begins_at_random(run, trained, table):
    model, data = trained("bert", id2label=NAMES), table("own.jsonl", lambda w: ["thing", "being"][truth(w)])
    found = run("eval", f"model={model}", f"data={data}", "model.head=new", "--json")
    assert found.json["base"]["loss"] > 0.2


def test_a_model_without_class_names_is_taken_by_count_and_number(run, trained, table):
    bare = {"id2label": {0: "LABEL_0", 1: "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    model = trained("bert", **bare)
    assert accuracy(run, model, table("numbers.jsonl", truth)) == 1
    assert accuracy(run, model, table("labels.jsonl", lambda w: f"LABEL_{truth(w)}")) == 1
    shifted = table("shifted.jsonl", lambda w: 1 + truth(w))
    found = run("eval", f"model={model}", f"data={shifted}")
    assert "the labels are the numbers 1, 2" in found.err
    assert "counts from 0 to 1" in found.err
    assert accuracy(run, model, shifted, 'data.labels=["1", "2"]') == 1
    only = table("only.jsonl", lambda w: 1, WORDS[:3])
    assert accuracy(run, model, only, "data.labels=[LABEL_0,LABEL_1]") == 1


def test_a_configuration_that_contradicts_itself(run, trained, table):
    model = trained("bert", id2label=NAMES, label2id={"animal": 0, "none": 1})
    found = run("eval", f"model={model}", f"data={table('x.jsonl', truth)}")
    assert "contradicts itself" in found.err


def test_other_heads_name_no_classes(run, encoder, table, tmp_path):
    config = json.loads((encoder / "config.json").read_text())
    folder = tmp_path / "tagger"
    folder.mkdir()
    for file in encoder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config["id2label"] = {"0": "O", "1": "B-PER", "2": "I-PER"}
    (folder / "config.json").write_text(json.dumps(config))
    found = run("plan", f"model={folder}", f"data={table('x.jsonl', lambda w: NAMES[truth(w)])}")
    assert "2 classes: animal, none" in found.out


# Masked language models.


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": "abcabcabcabcabcabcabcabc"[i % 3 : 18]}) + "\n" for i in range(40)))
    return file


@pytest.fixture(scope="session")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "mlm"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    byte_tokenizer(eos_token="<e>", pad_token="<p>", mask_token="<m>").save_pretrained(folder)
    return folder


def test_a_masked_model_is_trained_to_find_hidden_tokens(run, masked, texts, tmp_path):
    arguments = [f"model={masked}", f"data={texts}", "lr=2e-2", "r=8", "batch_size=16"]
    found = run("train", *arguments, f"out={tmp_path / 'o'}", "steps=80", "--json")
    assert found.code == 0, found.err
    assert found.json["after"]["loss"] < 0.6 * found.json["before"]["loss"]
    assert "task: masked-lm" in (tmp_path / "o" / "config.yaml").read_text()
    again = run("eval", tmp_path / "o", "--json").json["adapter"]
    assert again["loss"] == pytest.approx(found.json["after"]["loss"], rel=1e-5)
    assert "cannot generate" in run("generate", tmp_path / "o", "abc").err
    assert run("plan", *arguments).code == 0


def test_what_a_masked_model_cannot_do_is_refused(run, masked, encoder, texts, chats, tmp_path):
    outs = [tmp_path / name for name in "abcd"]
    first, second, third, fourth = (f"out={out}" for out in outs)
    found = run("train", f"model={masked}", f"data={chats}", first)
    assert "cannot answer in a conversation: give it running text" in found.err
    found = run("train", f"model={masked}", f"data={texts}", second, "model.task=causal-lm")
    assert "BertLMHeadModel is no causal model" in found.err
    assert "model.task=masked-lm" in found.err
    assert "no mask token" in run("train", f"model={encoder}", f"data={texts}", third).err
    assert (
        "packing=True needs a causal model"
        in run("train", f"model={masked}", f"data={texts}", fourth, "packing=true").err
    )
    assert not any((out / "adapter").exists() for out in outs)


# What `eval` judges.


@pytest.mark.parametrize("count", [3, 20, 230])
def test_data_named_for_eval_are_judged_whole(run, fine_tuned, tmp_path, count):
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "ab"}) + "\n" for i in range(count)))
    found = run("eval", fine_tuned, f"data={file}", "answer_tokens=1", "--json")
    assert found.code == 0, found.err
    for each in found.json.values():
        assert (each["examples"], each["answers"]) == (count, count)
    shown = run("eval", fine_tuned, f"data={file}", "answer_tokens=1", "eval_examples=2").out
    assert "2 of" in shown
    assert "examples" in shown


def test_without_data_the_held_out_records_are_judged(run, fine_tuned, chats):
    assert run("eval", fine_tuned, "--json").json["adapter"]["examples"] == 1
    assert run("eval", fine_tuned, f"data={chats}", "--json").json["adapter"]["examples"] == 12
    assert run("eval", fine_tuned, f"data={chats}", "eval_answers=2", "--json").json["adapter"]["answers"] == 2


def test_training_says_how_many_it_is_judged_by(run, model, tmp_path):
    file, test = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, n in ((file, 8), (test, 30)):
        path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "ab"}) + "\n" for i in range(n)))
    found = run(
        "train", f"model={model}", f"data={file}", f"eval_source={test}", "eval_examples=9", "eval_answers=0",
        f"out={tmp_path / 'o'}", "steps=1", "r=2",
    )  # fmt: skip
    assert "9 of 30 judged (data.eval_examples=9; null judges all)" in found.out
    assert json.loads((tmp_path / "o" / "run.json").read_text())["after"]["examples"] == 9


def test_several_sources_are_mixed_and_all_held_out_records_judged(run, model, tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for file in files:
        file.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "x"}) + "\n" for i in range(12)))
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"model: {model}\ndata:\n  source:\n    {files[0]}: 3\n    {files[1]}: 1\n  batch_size: 2\n")
    found = run("train", recipe, f"out={tmp_path / 'o'}", "steps=2", "r=2", "hold_out=5", "eval_answers=0", "--json")
    assert found.code == 0, found.err
    assert found.json["after"]["examples"] == 5
    assert run("eval", tmp_path / "o", "--json").json["adapter"]["examples"] == 5


def test_the_screen_shows_no_raw_control_characters(run, model, tmp_path):
    file = tmp_path / "x.jsonl"
    rows = [{"prompt": "\x1b]0;X\x07", "completion": "\u202ey"}] * 4
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = run("plan", f"model={model}", f"data={file}", "r=2")
    assert r"\x1b]0;X\x07" in found.out
    assert "\x1b" not in found.out + found.err
    assert "\u202e" not in found.out + found.err
