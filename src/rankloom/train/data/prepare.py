"""From records to token ids with a mask of what is trained."""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rankloom.errors import DataError, SettingsError
from rankloom.train.data.records import Chat, Labelled, Record, Records, Text, Where, choice, fault
from rankloom.train.data.template import TRAIN_ON, Rendered, choose, mask, renderings
from rankloom.train.data.tokenizer import Tokenizer, check_fast, pad_id, starts_with_bos

CHUNK = 256
log = logging.getLogger("rankloom.data")


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record: `ids` (int32) and `trained` (0/1 per token; empty for classification, which has `label`).

    A trained token is predicted from those before it, so the first is never trained; where `targets` (int32) are given,
    it is the target that is predicted in its place.
    """

    ids: array[int]
    trained: bytes
    label: int | None
    where: Where
    targets: array[int] | None = None

    def __len__(self) -> int:
        return len(self.ids)


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
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Prepared:
    """A tokenised data set, ready for `Batches`. `template`: the Jinja text that rendered it, to generate with."""

    examples: tuple[Example, ...]
    records: Records
    max_length: int
    pad_id: int
    template: str | None
    truncated: int
    dropped: int
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names by id; empty unless the data set is a classification."""
        return self.records.labels

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all token ids, masks and labels; a position in the data belongs to one digest."""
        found = hashlib.blake2b(digest_size=16)
        for x in self.examples:
            found.update(f"{len(x)} {x.label} ".encode())
            found.update(x.ids)
            found.update(x.trained)
        return found.hexdigest()

    def summary(self) -> Summary:
        """The figures of the data set; `str()` of it is for people."""
        lengths = [len(x) for x in self.examples]
        return Summary(
            source=self.records.source,
            format=self.records.format,
            n=len(lengths),
            tokens=sum(lengths),
            trained=sum(sum(x.trained) for x in self.examples),
            longest=max(lengths),
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
    chats = [record for record in records if isinstance(record, Chat)]
    used, note = choose(tokenizer, template) if chats else (None, None)
    notes += [note] if note else []
    if masked and records.format != "text":
        raise SettingsError(f"a masked language model takes running text; {records.source} is {records.format!r}")
    if masked or records.format == "classification":
        whole = _encoded(records.items, tokenizer, masked)
        cut = [_recut(x, record, tokenizer, limit, masked) for x, record in zip(whole, records)]
    else:
        if used is None:
            rendered, sources = _running(records.items, tokenizer), list(records.items)
        else:
            pairs = [(r, x) for x in chats for r in renderings(x, tokenizer, used, train_on)]
            rendered, sources = [r for r, _ in pairs], [x for _, x in pairs]
        notes += [ENDINGS[x] for x in sorted({r.ending for r in rendered} - {"own"})]
        whole = _tokens(rendered, sources, tokenizer)
        cut = [Example(x.ids[:limit], x.trained[:limit], None, x.where) for x in whole]
    usable = [x for x in cut if x.label is not None or any(x.trained)]
    if len(usable) < len(cut) and unusable == "error":
        raise _unusable(whole, cut, limit)
    if not usable:
        raise DataError(f"{records.source}: no example has a token to train within max_length={limit}; raise it")
    for note in notes:
        log.warning("%s: %s", records.source, note)
    return Prepared(
        examples=tuple(usable),
        records=records,
        max_length=limit,
        pad_id=pad,
        template=used.jinja if used else None,
        truncated=sum(len(x) > limit for x in whole),
        dropped=len(cut) - len(usable),
        notes=tuple(notes),
    )


ENDINGS = {
    "appended": "the chat template ends an answer with no special token: EOS is appended to the last one, and trained",
    "open": "neither the chat template nor the tokenizer has an end token: the model will not learn to stop",
}


def _running(records: Sequence[Record], tokenizer: Tokenizer) -> list[Rendered]:
    """Texts between the tokenizer's BOS (if it uses one) and EOS."""
    bos = tokenizer.bos_token if starts_with_bos(tokenizer) else ""
    eos = tokenizer.eos_token or ""
    bodies = [record.text for record in records if isinstance(record, Text)]
    texts = [f"{bos}{body}{eos}" for body in bodies]
    return [Rendered(text, ((0, len(text)),) if body.strip() else ()) for text, body in zip(texts, bodies)]


def _tokens(rendered: Sequence[Rendered], records: Sequence[Record], tokenizer: Tokenizer) -> list[Example]:
    found = []
    for start in range(0, len(rendered), CHUNK):
        part = rendered[start : start + CHUNK]
        coded = tokenizer([r.text for r in part], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for r, record, ids, offsets in zip(part, records[start:], coded["input_ids"], coded["offset_mapping"]):
            found.append(Example(array("i", ids), b"\0" + mask(offsets, r.spans)[1:], None, record.where))
    return found


def _encoded(records: Sequence[Record], tokenizer: Tokenizer, masked: bool) -> list[Example]:
    """Texts as the tokenizer encodes them by itself."""
    special = frozenset(tokenizer.all_special_ids)
    found = []
    for start in range(0, len(records), CHUNK):
        part = [x for x in records[start : start + CHUNK] if not isinstance(x, Chat)]
        coded = tokenizer([x.text for x in part], verbose=False)["input_ids"]
        found += [_as_encoded(x, ids, special, masked) for x, ids in zip(part, coded)]
    return found


def _as_encoded(record: Text | Labelled, ids: Sequence[int], special: frozenset[int], masked: bool) -> Example:
    trained = bytes(i not in special for i in ids) if masked else b""
    return Example(array("i", ids), trained, getattr(record, "label", None), record.where)


def _recut(example: Example, record: Record, tokenizer: Tokenizer, limit: int, masked: bool) -> Example:
    """The example within `limit`, its closing special tokens kept, as the tokenizer truncates."""
    if len(example) <= limit or isinstance(record, Chat):
        return example
    ids = tokenizer(record.text, truncation=True, max_length=limit)["input_ids"]
    return _as_encoded(record, ids, frozenset(tokenizer.all_special_ids), masked)


def _unusable(whole: Sequence[Example], cut: Sequence[Example], limit: int) -> DataError:
    """The error of the first example with nothing to train."""
    full, _ = next((x, y) for x, y in zip(whole, cut) if y.label is None and not any(y.trained))
    if not any(full.trained):
        return fault(
            full.where, "nothing to train: no assistant turn, or an empty text", "mend it, or use unusable='drop'"
        )
    first = full.trained.index(1)
    return fault(
        full.where,
        f"the answer is wholly cut: it begins at token {first + 1} of {len(full)}, max_length is {limit}",
        "raise max_length, shorten the prompt, or use unusable='drop'",
    )
