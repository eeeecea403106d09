"""Data for training: read, recognise, tokenise, look at, batch.

>>> records = load("train.jsonl")  # or a folder, "owner/name#500", "microworld:task"
>>> prepared = prepare(records, tokenizer, max_length=512)
>>> print(prepared.summary()); print(preview(prepared[0], tokenizer))
>>> for batch in Batches(prepared, batch_size=8, seed=0): ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rankloom.train.data.batches import Batch, Batches
from rankloom.train.data.convert import convert
from rankloom.train.data.detect import FORMATS, detect
from rankloom.train.data.examples import Example, Examples
from rankloom.train.data.masking import Masking, masking
from rankloom.train.data.mix import mixed
from rankloom.train.data.prepare import Prepared, Summary, prepare
from rankloom.train.data.records import Chat, Labelled, Record, Records, Row, Text, Turn, Where
from rankloom.train.data.show import preview
from rankloom.train.data.source import Source, rows_of
from rankloom.train.data.template import PLAIN, RAW, choose, prompt

__all__ = [
    "FORMATS",
    "PLAIN",
    "RAW",
    "Batch",
    "Batches",
    "Chat",
    "Example",
    "Examples",
    "Labelled",
    "Masking",
    "Prepared",
    "Record",
    "Records",
    "Row",
    "Summary",
    "Text",
    "Turn",
    "Where",
    "choose",
    "detect",
    "load",
    "masking",
    "prepare",
    "preview",
    "prompt",
]


def load(
    source: Source | Mapping[str, float],
    split: str = "train",
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> Records:
    """Read a data set and bring it into canonical form.

    Args:
        source: a JSONL, JSON, CSV, TSV, Parquet or text file; a folder with files `train*`, `valid*`, `test*`;
            `microworld:task`; a Hugging Face data set `owner/name` or `owner/name:subset`; or a list of dicts. `#N`
            behind a name draws N records without repetition, the same for the same `seed`. Several such names with
            the ratios in which they are mixed: `{"chats.jsonl": 3, "web.parquet#50000": 1}`.
        split: `train`, `validation`, `test`, or a split the source knows. A single file is `train`, unless its name
            says otherwise.
        format: one of `FORMATS`; by default it is recognised from the fields, which must agree in all records.
        columns: field → the column that holds it, e.g. `{"prompt": "q", "completion": "a"}`.
        labels: class names by id, to give a validation set the ids of its training set; numbers among the labels
            are ids then, where the names are words.
        classes: the same, but of a model: without meaning for data that is no classification.
        seed: of the draw.

    Raises:
        DataError: names file, line and field of what cannot be read.
        SettingsError: an argument has no meaning.
        MissingExtra: Parquet or the hub without `pip install 'rankloom[data]'`.
    """
    if isinstance(source, Mapping):
        return mixed(
            source,
            lambda one, names: load(
                one, split, format=format, columns=columns, labels=names or labels, classes=classes, seed=seed
            ),
        )
    rows, name, known = rows_of(source, split, seed)
    return convert(rows, name, format, columns, labels, classes or known, known)
