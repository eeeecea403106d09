"""Regular expressions on names: the answers are those of `re`, and none takes long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rankloom as rl
from rankloom.core import patterns
from rankloom.core.patterns import check, check_searched, fullmatches
from rankloom.errors import SettingsError, TargetError

LETTERS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\w", r"\d", r"[\d.]", "A", "é"])
PLACES = st.sampled_from([r"\b", r"\B", "^", "$", r"\Z", r"\A", ""])
TIMES = st.sampled_from(["*", "+", "?", "*?", "+?", "??", "{2}", "{1,3}", "{,2}", "{2,}", "{0}", "{3,}?"])
BEHIND = st.sampled_from(["(?<=a)", r"(?<!\.)", "(?<=ab)", "(?<![ab])"])


def larger(inner):
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs.map("".join),
        pairs.map(lambda p: f"({p[0]}|{p[1]})"),
        st.tuples(inner, TIMES).map(lambda p: f"(?:{p[0]}){p[1]}"),
        st.tuples(LETTERS, TIMES).map("".join),
        st.tuples(st.sampled_from(["(?=", "(?!", "(?i:", "(?-i:", "(?s:", "(", "(?:"]), inner).map(
            lambda p: f"{''.join(p)})"
        ),
    )


EXPRESSIONS = st.recursive(st.one_of(LETTERS, PLACES, BEHIND), larger, max_leaves=10)
NAMES = st.text("aab.1Aé_", max_size=7)


def by_sets(monkeypatch):
    monkeypatch.setattr(patterns, "WORK", -1)
    patterns._matcher.cache_clear()


def compiled(expression):
    try:
        return re.compile(expression)
    except re.error:
        return None


@given(EXPRESSIONS, st.lists(NAMES, min_size=1, max_size=5))
@settings(max_examples=250, deadline=None, derandomize=True)
def test_sets_say_what_re_says(expression, names):
    expected = compiled(expression)
    if expected is None:
        return
    tree = patterns._parsed(expression)
    step = patterns._sequence(tree, tree.state.flags)
    for name in names:
        read = patterns._Name(name, 10**9)
        assert bool(step(read, 1, True) >> len(name)) == bool(expected.fullmatch(name)), (expression, name)


HONEST = {
    "unsloth": r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|"
    r"q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|"
    r"attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|gate_proj|up_proj|down_proj)))",
    "ms-swift": r"^(model\.language_model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj))$",
    "llama-factory": r"^(?!.*(?:visual|vision_tower|lm_head)).*(?:q_proj|k_proj|up_proj).*",
    "groups": r"(?:\w+\.)+\d+\.(?:self_attn|mlp)\.(?:q|up)_proj",
    "blocks": r"(.*\.)?layers\.(1[0-9]|[02468])\..*_proj",
    "case": r"(?i).*Q_PROJ",
    "two groups": r"((\w+\.)*layers\.(\d+)\.)(self_attn\.)?(\w+_)*proj",
}
TREE = [
    f"{root}.{n}.{leaf}"
    for root in ("model.layers", "model.language_model.layers", "base.model.visual.blocks")
    for n in (0, 7, 18, 31)
    for leaf in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp", "input_layernorm", "attn.proj")
] + ["lm_head", "", "model", "model.embed_tokens"]


@pytest.mark.parametrize("expression", HONEST.values(), ids=HONEST)
def test_honest_expressions_by_either_way(expression, monkeypatch):
    expected = [bool(re.fullmatch(expression, name)) for name in TREE]
    assert [fullmatches(expression, name) for name in TREE] == expected
    by_sets(monkeypatch)
    assert [fullmatches(expression, name) for name in TREE] == expected
    patterns._matcher.cache_clear()


def hostile(inner):
    """Shapes of many ways over shapes of many ways."""
    pairs, count = st.tuples(inner, inner), st.integers(2, 60)
    return st.one_of(
        pairs.map(lambda p: f"({p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from("*+")).map(lambda p: f"(?:{p[0]}){p[1]}"),
        st.tuples(inner, count).map(lambda p: f"(?:{p[0]}){{{p[1]}}}"),
        st.tuples(inner, count).map(lambda p: f"(?:{p[0]}){{0,{p[1]}}}"),
        st.tuples(inner, count).map(lambda p: f"(?:{p[0]})?" * min(p[1], 300 // len(p[0]) + 1)),
        st.tuples(inner, count).map(lambda p: p[0] * min(p[1], 300 // len(p[0]) + 1)),
        pairs.map("".join),
        inner.map(lambda p: f"(?=(?:{p})*!)?{p}"),
    )


BOMBS = st.recursive(st.sampled_from([".", "a", r"\w", "[^!]", "a?", ".*", "(a|a)", r"\w+?"]), hostile, max_leaves=8)
NAMES_OF_A_MODEL = [f"model.layers.{n}.self_attn.q_proj" for n in range(6)] + ["a" * 60, "aaaa.aaaa.aaaa.aaaa"]


@given(BOMBS.map(lambda b: f"{b}!"))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_expression_takes_long(expression):
    start = time.process_time()
    for name in NAMES_OF_A_MODEL:
        try:
            fullmatches(expression, name)
        except SettingsError:
            continue
        except re.error:
            return
    assert time.process_time() - start < 1.5, expression


@pytest.mark.parametrize(
    "expression",
    [r"(.|.){26}!", ".?" * 26 + "!", "(.|.)" * 26 + "!", r"((((([\w.])+)+)+)+)+!", "(a|a)*" * 100 + "!", "(.*)*" * 300 + "!",
     "(?=(.|.){30}!)x", "(?:(?:.?){50}){50}!", r"(?:\b|.|\B){99}!", "(.{1,40}){1,40}!"],
)  # fmt: skip
def test_known_bombs_match_nothing_in_no_time(expression):
    start = time.process_time()
    for name in NAMES_OF_A_MODEL:
        assert not fullmatches(expression, name)
    assert time.process_time() - start < 1.0


def test_what_cannot_be_bounded_is_refused_by_name():
    for expression in (r"(.|.){30}(a)\2", r"(?>(.|.){30})", "(.|.){30}a++", "(.|(a)){30}(?(2)b|c)"):
        with pytest.raises(SettingsError, match="very many ways to match"):
            check(expression)
    assert fullmatches(r"(a|b)\1", "aa")
    assert not fullmatches(r"(a|b)\1", "ab")
    for expression in ("(a", "a{2,1}", "(" * 5000, "(" * 60 + ")" * 60, "[", r"\9", "(?m)^a", "a{99999999999999}"):
        with pytest.raises(re.error):
            check(expression)
    with pytest.raises(SettingsError, match="takes too long"):
        fullmatches("((?:aa)*b|(?:aa)*c|a)*" * 3 + "!", "a" * 250 + "!")


def test_an_expression_for_blocks_has_few_ways():
    for fine in ("layers", "h", r"(?:blocks|layers)", r"model\.layers", r"\w+"):
        check_searched(fine)
    for wild in ("(.|.){26}", "(.*)*", ".*.*.*"):
        with pytest.raises(SettingsError, match="write a name"):
            check_searched(wild)


def test_attach_never_hangs():
    model = nn.ModuleDict({f"a{i}": nn.Linear(2, 2) for i in range(9)} | {"a" * 60: nn.Linear(2, 2)})
    with pytest.raises(TargetError, match="matches no whole name"):
        rl.attach(model, rl.LoRA(), target_modules="(.|.){26}!")
    with pytest.raises(TargetError, match="rank_pattern: .* matches no target"):
        rl.attach(model, rl.LoRA(), target_modules=["a1"], rank_pattern={"(.|.){26}!": 2})
    with pytest.raises(SettingsError, match="write a name"):
        rl.attach(model, rl.LoRA(), target_modules=["a1"], layers_to_transform=[0], layers_pattern="(.|.){26}!")
    assert not hasattr(model, "rankloom")
