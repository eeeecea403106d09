"""Templates of model families, against TRL's copies of the models' own; long conversations; thoughts."""

from pathlib import Path

import pytest

from rankloom.errors import DataError, SettingsError
from rankloom.train.data import load, prepare
from rankloom.train.data import template as templates
from rankloom.train.data.families import FAMILIES
from rankloom.train.data.template import choose, prompt, renderings

TOKENS = sorted({token for family in FAMILIES.values() for token in family.tokens} | {"<think>", "</think>"})
ORIGINALS = {
    "qwen2_5": "qwen2_5", "qwen3": "qwen3", "llama3": "llama3", "gemma": "gemma", "phi3": "phi3",
    "chatml": "qwen3_instruct_2507",
}  # fmt: skip


def original(name):
    return (Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def chat(*contents, system=None, **answer):
    turns = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        turns.append({"role": ("user", "assistant")[i % 2], "content": content})
    turns[-1] |= answer
    return {"messages": turns}


LONG = chat(*(f"{'qa'[i % 2]} {i} x" for i in range(16)))
CHATS = {
    "one answer": chat("hi there", "hello"),
    "several": chat("a b", "c  d", "e", "f"),
    "with a system": chat("a", "b", "c", "d", system="be brief"),
    "white space": chat(" a ", "\n b \n", "c", " d\n"),
    "long": LONG,
}


@pytest.fixture
def tokenizer(make_tokenizer):
    def make(template=None, **options):
        made = make_tokenizer(template, **options)
        made.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|u|>", *TOKENS]})
        return made

    return make


def rendered(record, tokenizer, template="auto", train_on="assistant"):
    used, _ = choose(tokenizer, template)
    return renderings(load([record])[0], tokenizer, used, train_on)


def trained(found):
    return [found.text[a:b] for a, b in found.spans]


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("kind", CHATS)
def test_a_family_gives_the_text_of_its_own_template(tokenizer, name, kind):
    record = CHATS[kind]
    if name == "gemma" and kind == "with a system":
        record = {"messages": record["messages"][1:]}  # gemma 1 and 2 refuse it; gemma 3 is below
    [ours] = rendered(record, tokenizer(), name)
    [theirs] = rendered(record, tokenizer(original(ORIGINALS[name])), "auto", "all")
    assert ours.text.rstrip("\n") == theirs.text.rstrip("\n").removesuffix("</s>" if name == "gemma" else "\0")
    said = [t["content"].strip() for t in record["messages"] if t["role"] == "assistant"]
    assert len(ours.spans) == len(said)
    for part, content in zip(trained(ours), said):
        assert part.strip().startswith(content)
        assert part.rstrip().endswith((*FAMILIES[name].tokens, "</s>"))


def test_gemma_puts_the_system_text_before_the_first_question(tokenizer):
    record = CHATS["with a system"]
    [ours] = rendered(record, tokenizer(), "gemma")
    [theirs] = rendered(record, tokenizer(original("gemma3")), "auto", "all")
    assert ours.text == theirs.text.removesuffix("</s>")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_marks_answers_and_asks(tokenizer, name):
    made = tokenizer()
    record = {"messages": CHATS["several"]["messages"]}
    [found] = rendered(record, made, name)
    assert [part.strip()[0] for part in trained(found)] == ["c", "f"]
    assert all(part.endswith((*FAMILIES[name].tokens, "</s>")) for part in trained(found))
    used, _ = choose(made, name)
    asked, answer = prompt(load([record])[0], made, used)
    assert (asked, answer) == (found.text[: found.spans[-1][0]].rstrip(" "), "f")
    [example] = prepare(load([record]), made, template=name)
    assert made.decode([i for i, t in zip(example.ids, example.trained) if t]).count("c  d") == 1


def test_a_tokenizer_without_the_familys_tokens_is_refused(make_tokenizer):
    with pytest.raises(SettingsError, match=r"template='llama3' needs '<\|start_header_id\|>' as one token"):
        prepare(load([CHATS["several"]]), make_tokenizer(), template="llama3")
    with pytest.raises(SettingsError, match="did you mean 'llama3'"):
        prepare(load([CHATS["several"]]), make_tokenizer(), template="lama3")


def test_another_text_than_the_tokenizers_own_is_said(tokenizer):
    own = tokenizer(original("qwen3"))
    assert not any("is not that" in n for n in prepare(load([CHATS["several"]]), own, template="qwen3").notes)
    notes = prepare(load([CHATS["several"]]), own, template="llama3").notes
    assert "the text of template 'llama3' is not that of the tokenizer's own chat template" in notes


def test_tools_are_refused_by_name(tokenizer):
    record = {**CHATS["several"], "tools": [{"type": "function", "function": {"name": "f"}}]}
    with pytest.raises(DataError, match="built-in templates cannot show tools"):
        rendered(record, tokenizer(), "qwen3")


# Thoughts.

THOUGHT = chat("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\noh\n</think>\n\nd")


def test_an_empty_block_that_the_template_inserts_is_context(tokenizer):
    for template in (tokenizer(original("qwen3")), tokenizer()):
        how = "auto" if template.chat_template else "qwen3"
        [found] = rendered(CHATS["one answer"], template, how)
        assert "<think>\n\n</think>\n\nhello" in found.text
        assert [part.rstrip("\n") for part in trained(found)] == ["hello<|im_end|>"]
        used, _ = choose(template, how)
        asked, _ = prompt(load([CHATS["one answer"]])[0], template, used)
        assert asked.endswith("<think>\n\n</think>\n\n")


def test_an_empty_block_of_the_datas_own_is_trained(tokenizer):
    [found] = rendered(chat("a", "<think>\n\n</think>\n\nb"), tokenizer(original("qwen3_instruct_2507")))
    assert trained(found)[0].startswith("<think>\n\n</think>\n\nb")


@pytest.mark.parametrize("template", ["own", "qwen3"])
def test_one_example_for_each_answer_keeps_its_thoughts(tokenizer, template):
    made = tokenizer(original("qwen3"))
    how = "auto" if template == "own" else template
    turns = rendered(THOUGHT, made, how, "turns")
    assert [[p.rstrip("\n") for p in trained(x)] for x in turns] == [
        ["<think>\nhm\n</think>\n\nb<|im_end|>"], ["<think>\noh\n</think>\n\nd<|im_end|>"],
    ]  # fmt: skip
    assert "hm" not in turns[1].text
    [last] = rendered(THOUGHT, made, how, "last")
    assert last == turns[1]


def test_thoughts_in_a_field_of_their_own(tokenizer):
    record = chat("a", "b", reasoning_content="hm")
    for how in ("auto", "qwen3"):
        [found] = rendered(record, tokenizer(original("qwen3")), how)
        assert trained(found)[0].rstrip("\n") == "<think>\nhm\n</think>\n\nb<|im_end|>"


def test_a_template_that_drops_thoughts_is_refused_with_a_remedy_that_works(tokenizer):
    made = tokenizer(original("qwen3"))
    with pytest.raises(DataError, match=r"train_on='turns' \(one example per answer\) or 'last'"):
        rendered(THOUGHT, made)
    assert len(prepare(load([THOUGHT]), made, train_on="turns")) == 2
    assert len(prepare(load([THOUGHT]), made, train_on="last")) == 1
    assert len(prepare(load([THOUGHT]), made, template="qwen3")) == 1
    with pytest.raises(SettingsError, match="did you mean 'turns'"):
        prepare(load([THOUGHT]), made, train_on="turn")


def test_a_template_whose_prompt_opens_a_thought_is_refused_and_another_works(tokenizer):
    made = tokenizer(original("deepseekv3"))
    for how in ("assistant", "turns"):
        with pytest.raises(DataError, match="render to no prefix"):
            prepare(load([CHATS["several"]]), made, train_on=how)
    assert len(prepare(load([CHATS["several"]]), made, template="plain")) == 1


def test_a_conversation_that_ends_with_a_question(tokenizer):
    record = {"messages": CHATS["several"]["messages"] + [{"role": "user", "content": "more"}]}
    made = tokenizer(original("llama3"))
    assert len(rendered(record, made, train_on="turns")) == 2
    assert "more" not in rendered(record, made, train_on="last")[0].text
    with pytest.raises(DataError, match="no assistant turn"):
        prepare(load([{"messages": [{"role": "user", "content": "x"}]}]), made, train_on="turns")


# Long conversations.

UNMARKED = ["llama3", "llama3_1", "qwen2_5", "qwen3_instruct_2507", "gemma", "gemma3", "phi3", "cohere"]


@pytest.mark.parametrize("name", UNMARKED)
def test_many_turns_give_what_few_turns_give_one_by_one(tokenizer, name, monkeypatch):
    made = tokenizer(original(name))
    records = [LONG, chat(*(f" {'qa'[i % 2]} {i} \n" for i in range(12))), chat(*("ab" * 7))]
    quick = [rendered(r, made) for r in records]
    monkeypatch.setattr(templates, "_by_content", lambda *a: None)
    assert quick == [rendered(r, made) for r in records]


def test_the_number_of_renderings_does_not_grow_with_the_turns(tokenizer, monkeypatch):
    made, calls, apply = tokenizer(original("llama3")), [], templates._apply
    monkeypatch.setattr(templates, "_apply", lambda *a, **k: calls.append(1) or apply(*a, **k))
    counts = []
    for turns in (16, 64, 256):
        calls.clear()
        rendered(chat(*(f"{i} text" for i in range(turns))), made)
        counts.append(len(calls))
    assert counts[0] == counts[1] == counts[2] <= 8


SHOUT = (  # treats the sixth message in a way of its own
    "{% for m in messages %}{{ '<|a|>' if m['role'] == 'assistant' else '<|u|>' }}{{ m['content'] }}"
    "{{ '!' if loop.index == 6 }}{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)


def test_a_turn_that_is_told_apart_is_seen(tokenizer, monkeypatch):
    made = tokenizer(SHOUT)
    [found] = rendered(LONG, made)
    assert trained(found)[2] == "a 5 x!</s>"
    monkeypatch.setattr(templates, "_by_content", lambda *a: None)
    assert rendered(LONG, made) == [found]
