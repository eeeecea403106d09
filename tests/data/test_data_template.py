"""Assistant masks against ids and texts written by hand."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankloom.errors import DataError, SettingsError
from rankloom.train.data import PLAIN, load, prepare, prompt
from rankloom.train.data.examples import flags
from rankloom.train.data.prepare import trained_runs
from rankloom.train.data.template import choose, unmark

SIMPLE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|a|>' + m['content'] + eos_token }}"
    "{% else %}{{ '<|u|>' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|a|>' }}{% generation %}{{ m['content'] }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ '<|u|>' + m['content'] }}{% endif %}{% endfor %}"
)
EOS_OUTSIDE = MARKED.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")
BLOCKS = """{% for m in messages %}
    {%- if m['role'] == 'assistant' %}
        {{- '<|a|>\\n' }}
        {%- generation -%}
        {{ m['content'] }}
        {{- eos_token }}
        {% endgeneration %}
    {%- else %}
        {{- '<|u|>\\n' + m['content'] }}
    {%- endif %}
{% endfor %}"""
NO_END = SIMPLE.replace(" + eos_token", "")
FORGETFUL = (  # drops the content of every assistant turn but the last
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|a|>' + (m['content'] if loop.last else '…') + eos_token }}"
    "{% else %}{{ '<|u|>' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
)
THINKING = SIMPLE.replace(
    "{% if add_generation_prompt %}{{ '<|a|>' }}", "{% if add_generation_prompt %}{{ '<|a|>hmm' }}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + SIMPLE

TWO = [
    {
        "messages": [
            {"role": r, "content": c}
            for r, c in [("user", "ab"), ("assistant", "c"), ("user", "d"), ("assistant", "ef")]
        ]
    }
]


def ids(tokenizer, *tokens):
    return tokenizer.convert_tokens_to_ids(list(tokens))


@pytest.mark.parametrize("template", [SIMPLE, MARKED, EOS_OUTSIDE])
def test_ids_and_mask_by_hand(make_tokenizer, template):
    tokenizer = make_tokenizer(template)
    prepared = prepare(load(TWO), tokenizer)
    tokens = ["<|u|>", "a", "b", "<|a|>", "c", "</s>", "<|u|>", "d", "<|a|>", "e", "f", "</s>"]
    assert list(prepared[0].ids) == ids(tokenizer, *tokens)
    assert list(prepared[0].trained) == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert prepared.notes == ()


def test_train_on_all_trains_everything_but_the_first_token(make_tokenizer):
    prepared = prepare(load(TWO), make_tokenizer(SIMPLE), train_on="all")
    assert list(prepared[0].trained) == [0] + [1] * 11


@pytest.mark.parametrize("template", [MARKED, BLOCKS])
@pytest.mark.parametrize("answer", ["c", "cde", "c\nd"])
def test_markers_agree_with_transformers(make_tokenizer, template, answer):
    tokenizer = make_tokenizer(template)
    rows = [
        {"messages": [*TWO[0]["messages"], {"role": "user", "content": "g"}, {"role": "assistant", "content": answer}]}
    ]
    example = prepare(load(rows), tokenizer)[0]
    theirs = tokenizer.apply_chat_template(
        rows[0]["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert list(example.ids) == theirs["input_ids"]
    assert list(example.trained) == theirs["assistant_masks"]


def test_an_answer_that_begins_with_space_keeps_its_mask(make_tokenizer, trained_text):
    """Offsets that leave white space out must not lose the answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|u|>"]})
    tokenizer.chat_template = MARKED
    prepared = prepare(load([{"prompt": "q", "completion": " \n é"}]), tokenizer)
    assert trained_text(prepared[0], tokenizer) == " \n é</s>"


def test_markers_that_cannot_be_read_are_refused(make_tokenizer):
    counted = MARKED.replace("{% generation %}", "{% set t %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ t | length }}"
    )
    with pytest.raises(DataError, match="item 1: the generation markers of the chat template cannot be read"):
        prepare(load(TWO), make_tokenizer(counted))


def test_prefix_broken_by_earlier_turns(make_tokenizer, trained_text):
    tokenizer = make_tokenizer(FORGETFUL)
    with pytest.raises(DataError, match=r"item 1: .*no generation markers.*messages\[1\].*train_on='turns'"):
        prepare(load(TWO), tokenizer)
    turns = prepare(load(TWO), tokenizer, train_on="turns")
    assert [trained_text(x, tokenizer) for x in turns] == ["c</s>", "ef</s>"]
    assert [str(x.where) for x in turns] == ["records, item 1"] * 2
    last = prepare(load(TWO), tokenizer, train_on="last")
    assert [list(x.ids) for x in last] == [list(turns[1].ids)]
    one = prepare(load([{"prompt": "a", "completion": "b"}]), tokenizer)
    assert trained_text(one[0], tokenizer) == "b</s>"
    assert sum(prepare(load(TWO), tokenizer, train_on="all")[0].trained) == 11


def test_prefix_broken_by_the_generation_prompt(make_tokenizer):
    with pytest.raises(DataError, match=r"the 1 turns before it, ready for its answer.*messages\[1\]"):
        prepare(load(TWO), make_tokenizer(THINKING))


def test_a_template_that_refuses_names_the_record(make_tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"system": "s", "prompt": "a", "completion": "b"}]
    with pytest.raises(
        DataError, match=r"item 2: the chat template refuses.*\(system, user, assistant\): no system here"
    ):
        prepare(load(rows), make_tokenizer(STRICT))


def test_eos_is_appended_where_the_template_has_no_end(make_tokenizer, trained_text):
    tokenizer = make_tokenizer(NO_END)
    prepared = prepare(load(TWO), tokenizer)
    assert trained_text(prepared[0], tokenizer) == "c|ef</s>"
    assert any("EOS is appended" in note for note in prepared.notes)
    endless = make_tokenizer(NO_END, omit=("eos_token",))
    prepared = prepare(load(TWO), endless)
    assert trained_text(prepared[0], endless) == "c|ef"
    assert any("will not learn to stop" in note for note in prepared.notes)


def test_a_conversation_may_end_with_the_user(make_tokenizer, trained_text):
    tokenizer = make_tokenizer(SIMPLE)
    rows = [{"messages": TWO[0]["messages"][:3]}]
    example = prepare(load(rows), tokenizer)[0]
    assert tokenizer.decode(example.ids) == "<|u|>ab<|a|>c</s><|u|>d"
    assert trained_text(example, tokenizer) == "c</s>"


def test_plain_template_stands_in_and_says_so(make_tokenizer, trained_text):
    tokenizer = make_tokenizer(bos=True)
    rows = [{"system": "s", "prompt": "a", "completion": "b"}]
    prepared = prepare(load(rows), tokenizer)
    assert tokenizer.decode(prepared[0].ids) == "<s>### System:\ns\n\n### User:\na\n\n### Assistant:\nb</s>"
    assert trained_text(prepared[0], tokenizer) == "b</s>"
    assert any("no chat template: the plain one is used: ### User:" in note for note in prepared.notes)
    assert prepared.template == "{{ bos_token }}" + PLAIN


def test_raw_and_given_templates(make_tokenizer, trained_text):
    tokenizer = make_tokenizer(SIMPLE)
    raw = prepare(load([{"prompt": "a ", "completion": "b"}]), tokenizer, template="raw")
    assert tokenizer.decode(raw[0].ids) == "a b</s>"
    assert trained_text(raw[0], tokenizer) == "b</s>"
    given = prepare(load([{"prompt": "a", "completion": "b"}]), tokenizer, template=MARKED.replace("<|u|>", "<|a|>"))
    assert tokenizer.decode(given[0].ids) == "<|a|>a<|a|>b</s>"
    with pytest.raises(SettingsError, match=r"template='plan'.*did you mean 'plain'"):
        prepare(load(TWO), tokenizer, template="plan")


def test_tools_reach_the_template_and_not_the_built_in_ones(make_tokenizer):
    tokenizer = make_tokenizer("{{ tools[0]['name'] }}" + SIMPLE)
    records = load([{**TWO[0], "tools": [{"name": "F"}]}])
    assert tokenizer.decode(prepare(records, tokenizer)[0].ids).startswith("F<|u|>ab")
    with pytest.raises(DataError, match="item 1: the built-in templates cannot show tools"):
        prepare(records, tokenizer, template="plain")


def test_prompt_is_what_training_saw_before_the_last_answer(make_tokenizer):
    for template in (SIMPLE, None):
        tokenizer = make_tokenizer(template)
        chat = load(TWO)[0]
        text, answer = prompt(chat, tokenizer, choose(tokenizer)[0])
        example = prepare(load(TWO), tokenizer)[0]
        assert answer == "ef"
        assert tokenizer.decode(example.ids) == text + answer + "</s>"
    with pytest.raises(DataError, match="no assistant turn"):
        prompt(load([{"messages": TWO[0]["messages"][:1]}])[0], tokenizer, choose(tokenizer)[0])


def test_unmark():
    assert unmark("ab\ufdd0cd\ufdd1e\ufdd0\ufdd1\ufdd0f\ufdd1") == ("abcdef", ((2, 4), (5, 6)))


@pytest.fixture(scope="module")
def bytewise():
    """Merges, and characters of several bytes that are several tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["the cat sat on the mat, the hat"] * 9, trainer)
    return made


@given(st.text("the ca\n😀é", min_size=1, max_size=40), st.lists(st.integers(0, 40), max_size=8))
@settings(max_examples=300, deadline=None)
def test_trained_tokens_are_those_that_cover_a_character_of_a_span(bytewise, text, cuts):
    points = sorted({min(c, len(text)) for c in cuts})
    spans = list(zip(points[::2], points[1::2]))
    coded = bytewise.encode(text)
    wanted = [any(a < e and max(b, a + 1) > s for s, e in spans) for a, b in coded.offsets]
    wanted[0] = False
    assert flags(len(coded.ids), list(chain(*trained_runs(coded, len(coded.ids), text, spans)))) == bytes(wanted)


def test_white_space_that_no_token_covers():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    coded = made.encode("a  b  a  b")
    assert trained_runs(coded, 4, "a  b  a  b", [(1, 6)]) == ((1, 2),)
    assert trained_runs(coded, 4, "a  b  a  b", [(1, 3), (4, 6)]) == ()
    assert trained_runs(coded, 4, "a  b  a  b", [(3, 4), (5, 10)]) == ((1, 4),)
    assert trained_runs(coded, 4, "a  b  a  b", [(0, 10)]) == ((1, 4),)
