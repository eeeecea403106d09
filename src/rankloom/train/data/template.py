"""Conversations as text, with the characters that the assistant says.

Sources of a chat template: the tokenizer's own, a Jinja text given by hand, or one built in: that of a model family
(`families.py`), `plain` (a heading per turn) or `raw` (contents with nothing between). Where a template carries
`{% generation %}` markers they say what is the assistant's; otherwise each assistant turn is what the rendered
conversation gains over its prefix with the generation prompt, and that prefix property is verified.

An empty block of thoughts that a template puts before an answer (`<think>` `</think>`) is context, not trained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from rankloom.errors import DataError, SettingsError, suggest
from rankloom.train.data.families import FAMILIES
from rankloom.train.data.records import Chat, Turn, Where, fault
from rankloom.train.data.tokenizer import Tokenizer, specials, starts_with_bos

BUILT_IN = ("auto", "plain", "raw", *FAMILIES)
TRAIN_ON = ("assistant", "turns", "last", "all")
FEW = 4
"""Answers up to which each is looked up by rendering the conversation up to it."""
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
EMPTY_BLOCK = re.compile(r"\s*<([^<>/\s]+)>\s*</\1>\s*")
REWRITES = (
    "use train_on='turns' (one example per answer) or 'last', which show each answer as the model gives it; or the "
    "template of the model's family by name, template='plain', or train_on='all'"
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
        template: `auto` (the tokenizer's own, `plain` if it has none), `plain`, `raw`, a family (`chatml`, `llama3`,
            `qwen3` …), or a Jinja text.

    Raises:
        SettingsError: no such template, or the tokenizer lacks the family's tokens.
    """
    ends = specials(tokenizer)
    if template == "auto" and tokenizer.chat_template:
        return Template(tokenizer.get_chat_template(), False, ends), None
    if template not in BUILT_IN:
        if "{" not in template:
            raise SettingsError(f"template={template!r} is neither a Jinja text nor known{suggest(template, BUILT_IN)}")
        return Template(template, False, ends), "the chat template is the one given, not the tokenizer's"
    if template in FAMILIES:
        return _of_family(tokenizer, template, ends)
    start = "{{ bos_token }}" if starts_with_bos(tokenizer) else ""
    if template == "raw":
        return Template(start + RAW, True, ends), "turns are joined with nothing between (template 'raw')"
    shown = "### User: ⏎ … ⏎⏎ ### Assistant: ⏎ …" + (tokenizer.eos_token or "")
    return Template(start + PLAIN, True, ends), (
        f"the plain template is used: {shown}"
        if template == "plain"
        else f"the tokenizer has no chat template: the plain one is used: {shown}"
    )


PROBE = tuple(Turn(role, text) for role, text in zip(("user", "assistant") * 2, "abcd"))


def _of_family(tokenizer: Tokenizer, name: str, ends: tuple[str, ...]) -> tuple[Template, str | None]:
    family = FAMILIES[name]
    for token in family.tokens:
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise SettingsError(
                f"template={name!r} needs {token!r} as one token, and the tokenizer splits it: use template='auto', "
                "'plain', or the template of the model's own family"
            )
    found = Template(family.jinja, True, ends)
    if not tokenizer.chat_template:
        return found, f"the tokenizer has no chat template: that of {name} is used"
    probe = Chat(PROBE, Where("probe", 1))
    try:
        own = _apply(probe, tokenizer, tokenizer.get_chat_template(), len(PROBE))
    except DataError:
        own = ""
    same = own == _apply(probe, tokenizer, family.jinja, len(PROBE))
    return found, None if same else f"the text of template {name!r} is not that of the tokenizer's own chat template"


def renderings(chat: Chat, tokenizer: Tokenizer, template: Template, train_on: str = "assistant") -> list[Rendered]:
    """The examples that a conversation gives: one, or with `train_on="turns"` one for each of the assistant's turns.

    `turns` and `last` show a turn as it is when it is given, as the last of the conversation so far, and train it
    alone: right for templates that drop thoughts from earlier turns.

    Raises:
        DataError: the template refuses the conversation, or rewrites earlier turns (no prefix property).
    """
    if train_on in ("assistant", "all"):
        return [render(chat, tokenizer, template, train_on)]
    spoken = [i for i, turn in enumerate(chat.messages) if turn.role == "assistant"]
    if not spoken:
        return [render(chat, tokenizer, template)]
    chosen = spoken if train_on == "turns" else spoken[-1:]
    return [_last_only(replace(chat, messages=chat.messages[: i + 1]), tokenizer, template) for i in chosen]


def _last_only(chat: Chat, tokenizer: Tokenizer, template: Template) -> Rendered:
    _check_tools(chat, template)
    if template.marked:
        found = _by_marks(chat, tokenizer, template)
        found = Rendered(found.text, found.spans[-1:])
    else:
        last = len(chat.messages) - 1
        whole = _apply(chat, tokenizer, template.jinja, last + 1)
        before = _apply(chat, tokenizer, template.jinja, last, ask=True)
        _check_prefix(chat, whole, before, last, f"the {last} turns before it, ready for its answer,", NO_PREFIX)
        found = Rendered(whole, ((_begin(whole, len(before), chat.messages[last]), len(whole)),))
    return _closed(found, chat, template, tokenizer.eos_token)


def render(chat: Chat, tokenizer: Tokenizer, template: Template, train_on: str = "assistant") -> Rendered:
    """The conversation as text, with what is trained.

    The end token behind an assistant turn belongs to it. If the text ends with an assistant turn and no special
    token, EOS is appended, so that the model learns to stop.

    Raises:
        DataError: the template refuses the conversation, or rewrites earlier turns (no prefix property).
    """
    _check_tools(chat, template)
    if train_on == "all":
        text = _apply(chat, tokenizer, template.jinja, len(chat.messages))
        found = Rendered(text, ((0, len(text)),))
    elif template.marked:
        found = _by_marks(chat, tokenizer, template)
    else:
        found = _by_content(chat, tokenizer, template) or _by_prefix(chat, tokenizer, template)
    return _closed(found, chat, template, tokenizer.eos_token)


def _check_tools(chat: Chat, template: Template) -> None:
    if template.built_in and (chat.tools or any("tool_calls" in turn.extra for turn in chat.messages)):
        raise fault(chat.where, "the built-in templates cannot show tools", "use a tokenizer with a tool chat template")


def prompt(chat: Chat, tokenizer: Tokenizer, template: Template) -> tuple[str, str]:
    """(the text up to the last assistant turn, ready for generation, that turn's content): to ask and to compare.

    An empty block of thoughts before the answer belongs to the text, as in training.
    """
    last = max((i for i, turn in enumerate(chat.messages) if turn.role == "assistant"), default=None)
    if last is None:
        raise fault(chat.where, "no assistant turn", "add the answer")
    turn = chat.messages[last]
    asked = _apply(chat, tokenizer, template.jinja, last, ask=True)
    if turn.content:
        whole = _apply(chat, tokenizer, template.jinja, last + 1)
        if whole.startswith(asked):
            asked = whole[: _begin(whole, len(asked), turn)]
    return asked, turn.content


def _begin(whole: str, at: int, turn: Turn) -> int:
    """Where the trained text of a turn begins: behind an empty block that the template put before it."""
    block = EMPTY_BLOCK.match(whole, at)
    own = block is None or turn.content.lstrip().startswith(block[0].strip())
    return at if own or block is None else block.end()


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
    spans = [
        _span(chat, tokenizer, template, whole, i) for i, turn in enumerate(chat.messages) if turn.role == "assistant"
    ]
    return Rendered(whole, tuple(spans))


def _span(chat: Chat, tokenizer: Tokenizer, template: Template, whole: str, i: int) -> tuple[int, int]:
    """What the conversation gains by turn `i`, the assistant's."""
    before = _apply(chat, tokenizer, template.jinja, i, ask=True)
    after = _apply(chat, tokenizer, template.jinja, i + 1) if i + 1 < len(chat.messages) else whole
    if not whole.startswith(after):  # EOS that closes every conversation, whatever its last turn
        after = after.removesuffix(tokenizer.eos_token or "")
    _check_prefix(chat, whole, before, i, f"the {i} turns before it, ready for its answer,", REWRITES)
    _check_prefix(chat, whole, after, i, f"the first {i + 1} turns", REWRITES)
    return _begin(whole, len(before), chat.messages[i]), len(after)


NO_PREFIX = "put {% generation %} … {% endgeneration %} around the assistant's text, or use another template"


def _check_prefix(chat: Chat, whole: str, part: str, i: int, what: str, step: str) -> None:
    if whole.startswith(part):
        return
    where = next(n for n, (a, b) in enumerate(zip(part + "\0", whole + "\0\0")) if a != b)
    raise fault(
        chat.where,
        f"the chat template has no generation markers, and {what} render to no prefix of the conversation "
        f"(messages[{i}]; they part at {whole[max(0, where - 12) : where + 12]!r})",
        step,
    )


def _by_content(chat: Chat, tokenizer: Tokenizer, template: Template) -> Rendered | None:
    """What `_by_prefix` finds, in time linear in the conversation; None where that cannot be told, or for few turns.

    The answers' contents are rendered between two noncharacters and found. What stands before and behind a content is
    learnt from the first answer by its prefixes, has to stand about every other, and is verified at the last.
    """
    spoken = [i for i, turn in enumerate(chat.messages) if turn.role == "assistant"]
    if len(spoken) <= FEW or any(chat.messages[i].extra or not chat.messages[i].content.strip() for i in spoken):
        return None
    whole = _apply(chat, tokenizer, template.jinja, len(chat.messages))
    shown = replace(chat, messages=tuple(_shown(t) if t.role == "assistant" else t for t in chat.messages))
    text, contents = unmark(_apply(shown, tokenizer, template.jinja, len(chat.messages)))
    if text != whole or len(contents) != len(spoken):
        return None
    begin, end = _span(chat, tokenizer, template, whole, spoken[0])
    opening = whole[len(_apply(chat, tokenizer, template.jinja, spoken[0])) : contents[0][0]]
    before, behind = contents[0][0] - begin, whole[contents[0][1] : end]
    spans = [(start - before, stop + len(behind)) for start, stop in contents]
    for start, stop in contents[:-1]:
        if not (whole.endswith(opening, 0, start) and whole.startswith(behind, stop)):
            return None
    return Rendered(whole, (*spans[:-1], _span(chat, tokenizer, template, whole, spoken[-1])))


def _shown(turn: Turn) -> Turn:
    """The turn with marks around its content, white space at its ends left outside."""
    core = turn.content.strip()
    head, _, tail = turn.content.partition(core)
    return replace(turn, content=f"{head}{OPEN}{core}{CLOSE}{tail}")


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
