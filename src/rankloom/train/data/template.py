"""Conversations as text, with the characters that the assistant says.

Three sources of a chat template: the tokenizer's own, a Jinja text given by hand, or one of two built in:
`plain` (a heading per turn) and `raw` (contents with nothing between). Where a template carries
`{% generation %}` markers they say what is the assistant's; otherwise each assistant turn is what the rendered
conversation gains over its prefix with the generation prompt, and that prefix property is verified.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankloom.errors import SettingsError, suggest
from rankloom.train.data.records import Chat, fault
from rankloom.train.data.tokenizer import Tokenizer, specials, starts_with_bos

BUILT_IN = ("auto", "plain", "raw")
SAY = "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
PLAIN = (
    "{% for m in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{{ '### ' + m['role'] | capitalize + ':\\n' }}"
    "{% if m['role'] == 'assistant' %}" + SAY + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)
RAW = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    + SAY
    + "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
MARKER = re.compile(r"\{%(?P<left>[-+]?)\s*(?P<end>end)?generation\s*(?P<right>[-+]?)%\}")
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKS = re.compile(f"[{OPEN}{CLOSE}]")
REWRITES = (
    "put {% generation %} … {% endgeneration %} around the assistant's text in the template, "
    "or use train_on='all', template='plain' or another template"
)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text and the character ranges [start, end) of it that are trained.

    `ending` tells of a last assistant turn without an end token: `appended` (EOS was put there) or `open` (there is
    no EOS); `own` where nothing had to be done.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    ending: str = "own"


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template as it will be used: the Jinja text, whether it is one of ours, the tokenizer's special tokens."""

    jinja: str
    built_in: bool
    specials: tuple[str, ...]

    @property
    def marked(self) -> bool:
        """Whether it says by `{% generation %}` what the assistant says."""
        return MARKER.search(self.jinja) is not None


def choose(tokenizer: Tokenizer, template: str = "auto") -> tuple[Template, str | None]:
    """(the template to use, a note if it is not the tokenizer's own).

    Args:
        tokenizer: any fast tokenizer.
        template: `auto` (the tokenizer's own, `plain` if it has none), `plain`, `raw`, or a Jinja text.
    """
    ends = specials(tokenizer)
    if template == "auto" and tokenizer.chat_template:
        return Template(tokenizer.get_chat_template(), False, ends), None
    if template not in BUILT_IN:
        if "{" not in template:
            raise SettingsError(f"template={template!r} is neither a Jinja text nor known{suggest(template, BUILT_IN)}")
        return Template(template, False, ends), "the chat template is the one given, not the tokenizer's"
    start = "{{ bos_token }}" if starts_with_bos(tokenizer) else ""
    if template == "raw":
        return Template(start + RAW, True, ends), "turns are joined with nothing between (template 'raw')"
    shown = "### User: ⏎ … ⏎⏎ ### Assistant: ⏎ …" + (tokenizer.eos_token or "")
    return Template(start + PLAIN, True, ends), (
        f"the plain template is used: {shown}"
        if template == "plain"
        else f"the tokenizer has no chat template: the plain one is used: {shown}"
    )


def render(chat: Chat, tokenizer: Tokenizer, template: Template, train_on: str = "assistant") -> Rendered:
    """The conversation as text, with what is trained.

    The end token behind an assistant turn belongs to it. If the text ends with an assistant turn and no special
    token, EOS is appended, so that the model learns to stop.

    Raises:
        DataError: the template refuses the conversation, or rewrites earlier turns (no prefix property).
    """
    if template.built_in and (chat.tools or any("tool_calls" in turn.extra for turn in chat.messages)):
        raise fault(chat.where, "the built-in templates cannot show tools", "use a tokenizer with a tool chat template")
    if train_on == "all":
        text = _apply(chat, tokenizer, template.jinja, len(chat.messages))
        found = Rendered(text, ((0, len(text)),))
    elif template.marked:
        found = _by_marks(chat, tokenizer, template)
    else:
        found = _by_prefix(chat, tokenizer, template)
    return _closed(found, chat, template, tokenizer.eos_token)


def prompt(chat: Chat, tokenizer: Tokenizer, template: Template) -> tuple[str, str]:
    """(the text up to the last assistant turn, ready for generation, that turn's content): to ask and to compare."""
    last = max((i for i, turn in enumerate(chat.messages) if turn.role == "assistant"), default=None)
    if last is None:
        raise fault(chat.where, "no assistant turn", "add the answer")
    return _apply(chat, tokenizer, template.jinja, last, ask=True), chat.messages[last].content


def _apply(chat: Chat, tokenizer: Tokenizer, jinja: str, turns: int, ask: bool = False) -> str:
    from jinja2 import TemplateError

    messages = [turn.message() for turn in chat.messages[:turns]]
    options: dict[str, Any] = {"tools": list(chat.tools)} if chat.tools else {}
    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=jinja, tokenize=False, add_generation_prompt=ask, **options
        )
    except (TemplateError, TypeError) as error:
        roles = ", ".join(turn.role for turn in chat.messages[:turns])
        raise fault(
            chat.where, f"the chat template refuses this conversation ({roles}): {error}", "mend its turns"
        ) from error
    return text


def _by_marks(chat: Chat, tokenizer: Tokenizer, template: Template) -> Rendered:
    """The markers are rendered as two noncharacters, found, and taken out again."""
    plain = _apply(chat, tokenizer, template.jinja, len(chat.messages))
    marked = _apply(chat, tokenizer, MARKER.sub(_visible, template.jinja), len(chat.messages))
    text, spans = unmark(marked)
    if text != plain:
        raise fault(chat.where, "the generation markers of the chat template cannot be read", "mend the template")
    return Rendered(text, spans)


def _visible(match: re.Match[str]) -> str:
    """A block that prints the mark; an `if` keeps Jinja's treatment of white space around blocks."""
    return f"{{%{match['left']} if true %}}{CLOSE if match['end'] else OPEN}{{% endif {match['right']}%}}"


def unmark(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """`text` without marks, and the ranges that stood between an opening and a closing one."""
    spans, parts, length, opened, at = [], [], 0, 0, 0
    for match in MARKS.finditer(text):
        parts.append(text[at : match.start()])
        length, at = length + match.start() - at, match.end()
        if match[0] == OPEN:
            opened = length
        elif length > opened:
            spans.append((opened, length))
    return "".join(parts) + text[at:], tuple(spans)


def _by_prefix(chat: Chat, tokenizer: Tokenizer, template: Template) -> Rendered:
    whole = _apply(chat, tokenizer, template.jinja, len(chat.messages))
    spans = []
    for i, turn in enumerate(chat.messages):
        if turn.role != "assistant":
            continue
        before = _apply(chat, tokenizer, template.jinja, i, ask=True)
        after = _apply(chat, tokenizer, template.jinja, i + 1)
        for part, what in (
            (before, f"the {i} turns before it, ready for its answer,"),
            (after, f"the first {i + 1} turns"),
        ):
            if not whole.startswith(part):
                where = next(n for n, (a, b) in enumerate(zip(part + "\0", whole + "\0\0")) if a != b)
                raise fault(
                    chat.where,
                    f"the chat template has no generation markers, and {what} render to no prefix of the conversation "
                    f"(messages[{i}]; they part at {whole[max(0, where - 12) : where + 12]!r})",
                    REWRITES,
                )
        spans.append((len(before), len(after)))
    return Rendered(whole, tuple(spans))


def _closed(found: Rendered, chat: Chat, template: Template, eos: str | None) -> Rendered:
    """Spans that take in a following EOS; EOS appended where the conversation ends open."""
    end = eos or ""
    spans = tuple((a, b + len(end)) if found.text.startswith(end, b) else (a, b) for a, b in found.spans)
    is_open = chat.messages[-1].role == "assistant" and not found.text.rstrip().endswith(template.specials)
    if not (is_open and spans):
        return Rendered(found.text, spans)
    if not end:
        return Rendered(found.text, spans, "open")
    return Rendered(found.text + end, (*spans[:-1], (spans[-1][0], len(found.text) + len(end))), "appended")


def mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> bytes:
    """1 for each token that covers a character of a span (a token without characters counts where it stands)."""
    found, at = bytearray(len(offsets)), 0
    for i, (start, end) in enumerate(offsets):
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        found[i] = at < len(spans) and max(end, start + 1) > spans[at][0]
    return bytes(found)
