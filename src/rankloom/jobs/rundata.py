"""The records of a run: what is trained on and what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankloom.errors import DataError
from rankloom.train.config import DataSettings
from rankloom.train.data import Prepared, Records, load, prepare
from rankloom.train.data.order import sample
from rankloom.train.data.source import MICROWORLD, folder

SHARE, MOST = 10, 200
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


def read_records(settings: DataSettings, seed: int) -> RunRecords:
    """Both sets of records. Raises `DataError` naming file, line and field."""
    train = load(
        settings.source,
        settings.split,
        format=settings.format,
        columns=settings.columns,
        labels=settings.labels,
        seed=seed,
    )
    if settings.hold_out is None and _own_evaluation(settings):
        source = settings.eval_source or settings.source
        split = settings.eval_split or ("train" if settings.eval_source is not None else "validation")
        found = evaluation_records(settings, source, split, train.labels, seed)
        return RunRecords(train, found, f"{len(found)} records of {found.source}, split {split!r}")
    count = settings.hold_out or max(1, min(len(train) // SHARE, MOST))
    if len(train) < 2:
        raise DataError(
            f"{settings.source}: one record cannot be trained on and judged by; give more, or eval_source=FILE"
        )
    rest, held = train.divide(count, seed)
    return RunRecords(
        rest, _some(held, settings.eval_examples, seed), f"{count} of {len(train)} records held out", count
    )


def judged_records(settings: DataSettings, seed: int) -> Records:
    """What a training by these settings is judged by; the whole source where they hold nothing out."""
    if settings.hold_out is not None or _own_evaluation(settings):
        return read_records(settings, seed).evaluation
    return evaluation_records(settings, settings.source, settings.split, settings.labels, seed)


def _own_evaluation(settings: DataSettings) -> bool:
    return settings.eval_source is not None or settings.eval_split is not None or _has_validation(settings.source)


def evaluation_records(
    settings: DataSettings, source: str, split: str, labels: tuple[str, ...] | None, seed: int
) -> Records:
    """At most `eval_examples` records of one split of `source`."""
    if source.startswith(MICROWORLD):
        return _drawn(source.partition("#")[0], split, settings.eval_examples, seed)
    found = load(
        source, split, format=settings.format, columns=settings.columns, labels=labels or settings.labels, seed=seed
    )
    return _some(found, settings.eval_examples, seed)


def prepared(records: Records, tokenizer: Any, settings: DataSettings) -> Prepared:
    """Tokenised as the settings say."""
    return prepare(
        records,
        tokenizer,
        max_length=settings.max_length or min(LENGTH, tokenizer.model_max_length),
        train_on=settings.train_on,
        template=settings.template,
        unusable=settings.unusable,
    )


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


def _some(records: Records, most: int, seed: int) -> Records:
    if len(records) <= most:
        return records
    kept = set(sample(len(records), most, seed))
    return replace(records, items=tuple(x for i, x in enumerate(records.items) if i in kept))
