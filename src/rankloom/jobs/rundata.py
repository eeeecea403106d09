"""The records of a run: what is trained on and what it is judged by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankloom.errors import DataError
from rankloom.hf.classes import NEW, Head, given
from rankloom.train.config import DataSettings
from rankloom.train.data import Prepared, Records, load, prepare
from rankloom.train.data.convert import UnknownClassError
from rankloom.train.data.source import MICROWORLD, folder
from rankloom.train.data.table import available, default_cache

SHARE, MOST = 10, 200
MANY = 10_000
"""Records from which on a table on disk is used by itself."""
LENGTH = 1024


@dataclass(frozen=True)
class RunRecords:
    """Canonical records for training and for evaluation, and where the latter come from; `held_out`: how many were
    taken from the training data, None if they have a source of their own.
    """

    train: Records
    evaluation: Records
    note: str
    held_out: int | None = None

    @property
    def form(self) -> str:
        """The format, as `detect` names it."""
        return self.train.format

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of a classification."""
        return self.train.labels


def read_records(settings: DataSettings, seed: int, head: Head | None = None) -> RunRecords:
    """Both sets of records; labels have the ids of `head`, the model's own classifier, where there is one.

    Raises:
        DataError: names file, line and field, or the classes that the model does not have.
    """
    train = _load(settings, settings.source, settings.split, seed, head)
    if settings.hold_out is None and _own_evaluation(settings):
        source = settings.eval_source or settings.source
        split = settings.eval_split or ("train" if settings.eval_source is not None else "validation")
        found, note = _evaluation(replace(settings, labels=train.labels or None), source, split, seed, head)
        return RunRecords(train, found, note)
    count = settings.hold_out or max(1, min(len(train) // SHARE, MOST))
    if len(train) < 2:
        raise DataError(
            f"{train.source}: one record cannot be trained on and judged by; give more, or eval_source=FILE"
        )
    rest, held = train.divide(count, seed)
    kept, note = _some(held, settings.eval_examples, seed, f"{count} of {len(train)} records held out")
    return RunRecords(rest, kept, note, count)


def judged_records(settings: DataSettings, seed: int, head: Head | None = None) -> tuple[Records, str]:
    """What a training by these settings is judged by, and what that is in words; the whole source where they hold
    nothing out.
    """
    if settings.hold_out is not None or _own_evaluation(settings):
        found = read_records(settings, seed, head)
        return found.evaluation, found.note
    return _evaluation(settings, settings.source, settings.split, seed, head)


def _own_evaluation(settings: DataSettings) -> bool:
    own = settings.eval_source is not None or settings.eval_split is not None
    return own or (isinstance(settings.source, str) and _has_validation(settings.source))


def _evaluation(
    settings: DataSettings, source: str | Mapping[str, float], split: str, seed: int, head: Head | None
) -> tuple[Records, str]:
    """At most `eval_examples` records of one split of `source`, and what they are in words."""
    if isinstance(source, str) and source.startswith(MICROWORLD):
        task, _, number = source.partition("#")
        found = _drawn(task, split, settings.eval_examples or int(number or MOST), seed)
        return found, f"{len(found)} records of {found.source}, split {split!r}"
    found = _load(settings, source, split, seed, head)
    return _some(found, settings.eval_examples, seed, f"{len(found)} records of {found.source}, split {split!r}")


def _load(
    settings: DataSettings, source: str | Mapping[str, float], split: str, seed: int, head: Head | None
) -> Records:
    own = head.names if head is not None and head.named else None
    try:
        found = load(
            source,
            split,
            format=settings.format,
            columns=settings.columns,
            labels=settings.labels,
            classes=own,
            seed=seed,
        )
    except UnknownClassError as error:
        raise DataError(f"{error}; {head}: {NEW}" if own and settings.labels is None else str(error)) from error
    if found.labels and settings.labels is None and head is not None and not head.named:
        _check_numbers(found.labels, head)
    return found


def _check_numbers(labels: tuple[str, ...], head: Head) -> None:
    """Refuse numbers that are not the ids of a classifier without names."""
    numbers = [int(name) for name in labels if name.removeprefix("-").isdecimal()]
    if len(numbers) == len(labels) and numbers != list(range(len(head.names))):
        raise DataError(
            f"the labels are the numbers {', '.join(labels)}; {head}, which counts from 0 to {len(head.names) - 1}: "
            f"{given(head.names)} reads them as its ids, {given(labels)} as names in this order; {NEW}"
        )


def prepared(records: Records, tokenizer: Any, settings: DataSettings, task: str = "causal-lm") -> Prepared:
    """Tokenised as the settings and the model's task say."""
    return prepare(
        records,
        tokenizer,
        max_length=settings.max_length or min(LENGTH, tokenizer.model_max_length),
        train_on=settings.train_on,
        template=settings.template,
        unusable=settings.unusable,
        masked=task == "masked-lm",
        cache=_cache(settings.cache, len(records)),
    )


def _cache(said: str, count: int) -> Path | None:
    """The folder for tables of tokenised data; None: in memory."""
    if said == "off" or (said == "auto" and (count < MANY or not available())):
        return None
    return default_cache() if said == "auto" else Path(said).expanduser()


def _has_validation(source: str) -> bool:
    base = source.partition("#")[0]
    if base.startswith(MICROWORLD):
        return True
    path = Path(base).expanduser()
    if not path.is_dir():
        return False
    try:
        return bool(folder(path, "validation"))
    except DataError:
        return False


def _drawn(source: str, split: str, count: int, seed: int) -> Records:
    """`count` examples, or as many as a small task has to within a half."""
    while True:
        try:
            return load(f"{source}#{count}", split, seed=seed)
        except DataError:
            if count < 2:
                raise
            count //= 2


def _some(records: Records, most: int | None, seed: int, note: str) -> tuple[Records, str]:
    """At most `most` records, each to be judged once whatever the ratios of their sources, and a note that says so
    where some are left out.
    """
    records = replace(records, parts=(), ratios=())
    if most is None or len(records) <= most:
        return records, note
    return records.sample(
        most, seed
    ), f"{note}; {most} of {len(records)} judged (data.eval_examples={most}; null judges all)"
