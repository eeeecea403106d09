"""Data sets of the Hugging Face hub as plain rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rankloom.errors import DataError, MissingExtra, suggest
from rankloom.train.data.order import draw
from rankloom.train.data.records import Row, Rows, Where, fingerprint

BLOCK = 1024
"""Rows that are taken from the table at a time."""


class HubRows(Rows):
    """Rows of a `datasets.Dataset`, whose tables are mapped from the disk; `numbers`: theirs in the split, from 0."""

    def __init__(self, table: Any, where: str, numbers: Sequence[int] | np.ndarray[Any, Any]) -> None:
        self.table, self.where, self.numbers = table, where, numbers
        self._block: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return len(self.table)

    def at(self, index: int) -> Row:
        first = index - index % BLOCK
        if self._block[0] != first:
            columns = self.table[first : first + BLOCK]
            rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
            self._block = (first, rows)
        return Row(self._block[1][index - first], Where(self.where, int(self.numbers[index]) + 1, "row"))

    def digest(self) -> str:
        return fingerprint(self.where, str(self.table._fingerprint))


def read(
    id: str, subset: str | None, split: str, count: int | None, seed: int
) -> tuple[HubRows, tuple[str, ...] | None]:
    """(the rows, class names of a `label` column if the data set declares them).

    Args:
        id: `owner/name` or `name`; `subset`: its configuration, None for the default.
        split: a split that the data set has.
        count: draw this many rows without repetition, the same for the same `seed`; None for all.

    Raises:
        MissingExtra: `datasets` is not installed.
        DataError: the data set, subset or split cannot be had, or holds fewer rows than `count`.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "data", f"reading {id!r} from the hub") from error
    name = f"{id}:{subset}" if subset else id
    try:
        found = datasets.load_dataset(id, subset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r} is no file here, and the Hugging Face hub does not give it as a data set: {error}; "
            "check the spelling, the network and HF_HUB_OFFLINE, or give a file"
        ) from error
    if split not in found:
        raise DataError(f"{name}: there is no split {split!r}{suggest(split, found)}")
    rows = found[split]
    if count is not None and count > len(rows):
        raise DataError(
            f"{name}[{split}]: {count} records are asked for, there are {len(rows)}; ask for at most #{len(rows)}"
        )
    chosen = range(len(rows)) if count is None else draw(len(rows), count, seed)
    label = rows.features.get("label")
    names = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    return HubRows(rows if count is None else rows.select(chosen), f"{name}[{split}]", chosen), names
