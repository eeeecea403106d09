"""From records to token ids with a mask of what is trained."""

from __future__ import annotations

import logging
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from rankloom.errors import DataError, SettingsError, printable
from rankloom.train.data.examples import Builder, Example, Examples, Runs, runs_of
from rankloom.train.data.records import Chat, Labelled, Record, Records, Turn, choice, fault, fingerprint
from rankloom.train.data.table import FORM, open_or_make
from rankloom.train.data.template import TRAIN_ON, Template, choose, renderings
from rankloom.train.data.tokenizer import Tokenizer, check_fast, pad_id, specials, starts_with_bos

CHUNK = 256
log = logging.getLogger("rankloom.data")


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a prepared data set; `tokens`, `trained`, `longest` in tokens after truncation."""

    source: str
    format: str
    n: int
    tokens: int
    trained: int
    longest: int
    max_length: int
    truncated: int
    dropped: int
    labels: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        return asdict(self)

    def __str__(self) -> str:
        what = f"{self.trained} trained" if not self.labels else f"{len(self.labels)} classes: {', '.join(self.labels)}"
        lines = [
            f"{self.source}: {self.n} examples ({self.format}), {self.tokens} tokens, {what}",
            f"longest {self.longest} of at most {self.max_length}; {self.truncated} truncated, {self.dropped} dropped",
        ]
        lines += [f"columns not used: {', '.join(self.unused)}"] if self.unused else []
        return printable("\n".join([*lines, *(f"note: {note}" for note in self.notes)]))


@dataclass(frozen=True)
class Prepared:
    """A tokenised data set, ready for `Batches`. `template`: the Jinja text that rendered it, to generate with;
    `parts`: how many examples come from each of several sources.
    """

    examples: Examples
    records: Records
    max_length: int
    pad_id: int
    template: str | None
    truncated: int
    dropped: int
    notes: tuple[str, ...]
    parts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, index: int) -> Example:
        found: Example = self.examples[index]
        return found

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names by id; empty unless the data set is a classification."""
        return self.records.labels

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all token ids, masks and labels; a position in the data belongs to one digest."""
        return self.examples.digest()

    def summary(self) -> Summary:
        """The figures of the data set; `str()` of it is for people."""
        lengths = self.examples.lengths
        return Summary(
            source=self.records.source,
            format=self.records.format,
            n=len(lengths),
            tokens=int(lengths.sum()),
            trained=self.examples.trained,
            longest=int(lengths.max()),
            max_length=self.max_length,
            truncated=self.truncated,
            dropped=self.dropped,
            labels=self.labels,
            unused=self.records.unused,
            notes=self.notes,
        )


def prepare(
    records: Records,
    tokenizer: Tokenizer,
    *,
    max_length: int = 1024,
    train_on: str = "assistant",
    template: str = "auto",
    unusable: str = "error",
    masked: bool = False,
    cache: Path | None = None,
) -> Prepared:
    """Tokenise a data set.

    Conversations go through a chat template and are trained on the assistant's tokens with their end token; running
    text is trained throughout and ends with EOS; a text to classify is encoded as the tokenizer does by itself.

    Args:
        records: from `load`.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens kept of an example, from its start; the tokenizer's own limit if that is lower.
        train_on: for conversations: `assistant` (all of its turns), `turns` (an example for each of its turns, as it is
            when it is given), `last` (its last turn alone), `all` (every token).
        template: `auto` (the tokenizer's, else `plain`), `plain`, `raw` (turns with nothing between), a model family
            (`chatml`, `llama3`, `qwen2`, `qwen2_5`, `qwen3`, `mistral`, `gemma`, `phi3`, `phi4`, `zephyr`), or a Jinja
            text.
        unusable: an example left with nothing to train (its answer wholly cut, or empty) is an `error` or is counted
            and left out (`drop`).
        masked: texts for a masked language model: encoded as the tokenizer does by itself, special tokens not trained.
        cache: a folder for tables on disk: the result is written there, mapped into memory, and found again by the
            content of the records, the tokenizer and the settings. None: the result is held in memory.

    Raises:
        DataError: an example cannot be used, the template rewrites earlier turns, there is nothing to pad with.
        SettingsError: an argument is not one of its values.
    """
    choice("train_on", train_on, TRAIN_ON)
    choice("unusable", unusable, ("error", "drop"))
    if max_length < 2:
        raise SettingsError(f"max_length={max_length} leaves no token to predict; use 2 or more")
    check_fast(tokenizer)
    pad, note = pad_id(tokenizer)
    notes = [note] if note else []
    if note and records.labels:
        notes.append(f"set model.config.pad_token_id = {pad}: a sequence classifier finds the end of a text by it")
    limit = min(max_length, tokenizer.model_max_length)
    if limit < max_length:
        notes.append(f"max_length {max_length} is lowered to {limit}, the most that the tokenizer's model takes")
    if masked and records.format != "text":
        raise SettingsError(f"a masked language model takes running text; {records.source} is {records.format!r}")
    chats = records.format not in ("text", "classification")
    used, note = choose(tokenizer, template) if chats else (None, None)
    notes += [note] if note else []
    work = _Work(records, tokenizer, used, limit, train_on, unusable == "drop", masked)
    if cache is None or not records.digest:
        builder = Builder()
        about = work.fill(builder)
        examples = builder.close()
    else:
        examples, about = open_or_make(cache / work.key(), work.fill)
    notes += [ENDINGS[x] for x in about["endings"]]
    notes += [TOLD[what].format(about[what], len(records)) for what in TOLD if about[what]]
    for note in notes:
        log.warning("%s: %s", records.source, note)
    return Prepared(
        examples=examples,
        records=records,
        max_length=limit,
        pad_id=pad,
        template=used.jinja if used else None,
        truncated=about["truncated"],
        dropped=about["dropped"],
        notes=tuple(notes),
        parts=tuple(about["parts"]),
    )


ENDINGS = {
    "appended": "the chat template ends an answer with no special token: EOS is appended to the last one, and trained",
    "open": "neither the chat template nor the tokenizer has an end token: the model will not learn to stop",
}


TOLD = {
    "silent": "{} of {} conversations have an empty answer: they teach the model to say nothing",
    "controls": "{} of {} conversations hold special tokens of the tokenizer in their own text, which the model will "
    "read as control tokens: take them out, or put a space into them",
}
"""What is counted in conversations, and what is said of it."""


@dataclass
class _Draft:
    """An example before it is tokenised: a text with its trained ranges; `spans` None: the tokenizer puts its own
    special tokens.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None
    record: Record


@dataclass
class _Work:
    """The way from records to examples, a chunk at a time."""

    records: Records
    tokenizer: Tokenizer
    template: Template | None
    limit: int
    train_on: str
    drop: bool
    masked: bool

    def key(self) -> str:
        """A name for the result: a fingerprint of all that decides it."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        said = self.template and (self.template.jinja, self.template.specials)
        settings = (self.limit, self.train_on, self.drop, self.masked, said, self.tokenizer.eos_token)
        texts = (FORM, self.records.digest, self.tokenizer.all_special_tokens, core and core.to_str(), settings)
        return fingerprint(*map(repr, texts))

    def fill(self, builder: Builder) -> dict[str, Any]:
        """Put every example into `builder`, and say what was met on the way."""
        bounds = list(accumulate(self.records.parts or (len(self.records),)))
        parts, endings, truncated, dropped, number = [0] * len(bounds), set(), 0, 0, 0
        silent, controls = 0, 0
        for chunk in _chunks(self.records):
            drafts = [
                (bisect_right(bounds, number + i), draft, ending)
                for i, record in enumerate(chunk)
                for draft, ending in self._drafts(record)
            ]
            number += len(chunk)
            chats = [record for record in chunk if isinstance(record, Chat)]
            silent += sum(map(_is_silent, chats))
            controls += sum(any(map(self._holds_control, chat.messages)) for chat in chats)
            endings |= {ending for _, _, ending in drafts}
            for (part, draft, _), (ids, runs, length) in zip(drafts, self._tokens([d for _, d, _ in drafts])):
                label = draft.record.label if isinstance(draft.record, Labelled) else None
                truncated += length > self.limit
                if label is None and not runs:
                    if not self.drop:
                        raise self._unusable(draft)
                    dropped += 1
                    continue
                parts[part] += 1
                builder.add(ids, runs, label, draft.record.where)
        if not sum(parts):
            raise DataError(
                f"{self.records.source}: no example has a token to train within max_length={self.limit}; raise it"
            )
        return {
            "endings": sorted(endings - {"own"}),
            "truncated": truncated,
            "dropped": dropped,
            "silent": silent,
            "controls": controls,
            "parts": parts if self.records.parts else [],
        }

    def _holds_control(self, turn: Turn) -> bool:
        return self._controls is not None and self._controls.search(turn.content) is not None

    @cached_property
    def _controls(self) -> re.Pattern[str] | None:
        found = specials(self.tokenizer)
        return re.compile("|".join(map(re.escape, found))) if found else None

    def _drafts(self, record: Record) -> list[tuple[_Draft, str]]:
        if isinstance(record, Chat):
            assert self.template is not None
            found = renderings(record, self.tokenizer, self.template, self.train_on)
            return [(_Draft(r.text, r.spans, record), r.ending) for r in found]
        if isinstance(record, Labelled) or self.masked:
            return [(_Draft(record.text, None, record), "own")]
        text = f"{self._bos}{record.text}{self.tokenizer.eos_token or ''}"
        return [(_Draft(text, ((0, len(text)),) if record.text.strip() else (), record), "own")]

    @cached_property
    def _bos(self) -> str:
        return str(self.tokenizer.bos_token) if starts_with_bos(self.tokenizer) else ""

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    def _tokens(self, drafts: Sequence[_Draft]) -> Iterator[tuple[Sequence[int], Runs, int]]:
        """(ids and trained ranges within the limit, tokens before it) of each draft."""
        if not drafts:
            return
        plain = drafts[0].spans is None
        coded = self.tokenizer(
            [d.text for d in drafts],
            add_special_tokens=plain,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for i, (draft, ids) in enumerate(zip(drafts, coded["input_ids"])):
            if plain:
                yield self._encoded(draft, ids)
                continue
            runs = trained_runs(coded.encodings[i], len(ids), draft.text, draft.spans or ())
            yield ids[: self.limit], _within(runs, self.limit), len(ids)

    def _encoded(self, draft: _Draft, ids: Sequence[int]) -> tuple[Sequence[int], Runs, int]:
        """A text as the tokenizer encodes it, its closing special tokens kept where it is cut."""
        length = len(ids)
        if length > self.limit:
            ids = self.tokenizer(draft.text, truncation=True, max_length=self.limit)["input_ids"]
        return ids, runs_of([i not in self._special for i in ids]) if self.masked else (), length

    def _unusable(self, draft: _Draft) -> DataError:
        """The error of an example with nothing to train."""
        coded = self.tokenizer([draft.text], add_special_tokens=False, verbose=False)
        length = len(coded["input_ids"][0])
        runs = trained_runs(coded.encodings[0], length, draft.text, draft.spans or ())
        if not runs:
            return fault(
                draft.record.where,
                "nothing to train: no assistant turn, or an empty text",
                "mend it, or use unusable='drop'",
            )
        return fault(
            draft.record.where,
            f"the answer is wholly cut: it begins at token {runs[0][0] + 1} of {length}, max_length is {self.limit}",
            "raise max_length, shorten the prompt, or use unusable='drop'",
        )


def _is_silent(chat: Chat) -> bool:
    """Whether an answer is without a word, a thought or a call."""
    return any(
        turn.role == "assistant" and not turn.content.strip() and not any(turn.extra.values()) for turn in chat.messages
    )


def _chunks(records: Records) -> Iterator[list[Record]]:
    each = iter(records)
    while chunk := list(islice(each, CHUNK)):
        yield chunk


def _within(runs: Runs, limit: int) -> Runs:
    return runs if not runs or runs[-1][1] <= limit else tuple((a, min(b, limit)) for a, b in runs if a < limit)


def trained_runs(encoding: Any, length: int, text: str, spans: Sequence[tuple[int, int]]) -> Runs:
    """The ranges of tokens that cover a character of `spans`; the first token is in none, since nothing predicts it."""
    if tuple(spans) == ((0, len(text)),):
        return ((1, length),) if length > 1 else ()
    found: list[tuple[int, int]] = []
    for start, end in spans:
        first, last = _covering(encoding, length, start, end)
        first = max(first, 1)
        if found and first <= found[-1][1]:
            first = found.pop()[0] if first <= found[-1][1] else first
        if first < last:
            found.append((first, last))
    return tuple(found)


def _covering(encoding: Any, length: int, start: int, end: int) -> tuple[int, int]:
    """The range of tokens that cover a character of [start, end); one without characters counts where it stands."""
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None:
        here = [i for i, (a, _) in enumerate(encoding.offsets) if start <= a < end]
        return (here[0], here[-1] + 1) if here else (0, 0)
    last = next(t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None)
    while first > 0 and (chars := encoding.token_to_chars(first - 1)) is not None and chars[0] >= start:
        first -= 1
    while last + 1 < length and (chars := encoding.token_to_chars(last + 1)) is not None and chars[0] < end:
        last += 1
    return first, last + 1
