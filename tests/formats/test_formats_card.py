"""What a card says of names, data and numbers that come from elsewhere: one line each, that shows and does nothing."""

from __future__ import annotations

import re

import pytest
import yaml
from formats_tiny import adapted
from hypothesis import given, settings
from hypothesis import strategies as st

import rankloom as rl
from rankloom.errors import CONTROL
from rankloom.formats.card import render, said

EVIL = [
    "a\n\n# Injected",
    "a\r\n\r\n## Injected\r\n<script>alert(1)</script>",
    "x` y <img src=x onerror=alert(1)> ```\n```\n# Injected",
    "[click](http://evil.example) ![i](http://evil.example/i.png)",
    "\x1b]0;title\x07\x9b31m\u202etxt",
    "a | b |\n| --- | --- |\n| c | d |",
    "\\[x](y) \\`<b>`",
    "# Injected",
    "1. a\n2. b",
    "---\nlicense: mit\n---",
    "\ud800",
]
ABOUT = {
    "base": "base", "library": "peft", "method": "lora", "name": "default", "tags": ["rankloom"], "compat": "PEFT: yes",
    "parameters": 10, "tensors": 2, "settings": {"method": "lora"}, "usage": ["import rankloom"],
    "versions": {"rankloom": "1"},
}  # fmt: skip
PLACES = {
    "title": lambda text: ({"title": text}, {}),
    "base": lambda text: ({}, {"base": text}),
    "data": lambda text: ({"data": text}, {}),
    "data list": lambda text: ({"data": [text, "b"]}, {}),
    "data by name": lambda text: ({"data": {text: text}}, {}),
    "metric": lambda text: ({"metrics": {text: 1.0}}, {}),
    "metric before": lambda text: ({"metrics": {text: {text: 1.0, "after": text}}}, {}),
    "setting": lambda text: ({"settings": {text: text}}, {}),
    "compat": lambda text: ({}, {"compat": text}),
    "plan": lambda text: ({}, {"settings": {"target_modules": text}}),
    "tag": lambda text: ({"tags": [text]}, {}),
}


def shape(card):
    """What the card's lines are: headings, rows, rules, fences; texts and code left out."""
    head, body = card.split("\n---\n", 1) if card.startswith("---\n") else ("", card)
    lines = [re.match(r"#+ |\||- |```\w*|$", line) for line in body.split("\n")]
    return [found[0] if found else "text" for found in lines]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_nothing_changes_the_shape_of_a_card(evil, place):
    def made(text):
        card, about = PLACES[place](text)
        return render(card, {**ABOUT, **about})

    card = made(evil)
    assert shape(card) == shape(made("plain"))
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert not CONTROL.search(body)
    assert set(yaml.safe_load(front)) <= {"base_model", "library_name", "license", "tags"}
    shown = re.sub(r"```json.*?```|(`+)[^`].*?\1(?!`)", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)\[|<\w|\n# Injected", shown)


@given(st.text("a1 -+#>`*_[]()<&|~\\\n\r\t\x1b.", max_size=20))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_one_line_that_says_the_text(text):
    found = said(text)
    assert "\n" not in found
    back = re.sub(r"\\([\\`*\[\]|~_#>.)+-])", r"\1", found).replace("&lt;", "<").replace("&amp;", "&")
    assert back == " ".join(text.split()).replace("\x1b", "\\x1b")


def test_ordinary_texts_stay_as_they_are():
    for text in ("exact_match", "-0.5", "1.5", "3 records of data/train.jsonl", "a-b", "PEFT: yes · vLLM: yes"):
        assert said(text) == text


def test_the_name_of_a_base_in_a_saved_card(tmp_path):
    model = adapted()
    model.name_or_path = "a\n\n# Injected <script>alert(1)</script>"
    rl.save(model, tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert "\n# Injected" not in text.split("\n---\n", 1)[1]
