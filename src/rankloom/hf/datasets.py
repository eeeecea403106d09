"""Data sets of the Hugging Face hub as plain rows."""

from __future__ import annotations

from typing import Any

from rankloom.errors import DataError, MissingExtra, suggest
from rankloom.train.data.order import sample


def read(
    id: str, subset: str | None, split: str, count: int | None, seed: int
) -> tuple[list[tuple[int, dict[str, Any]]], tuple[str, ...] | None]:
    """(1-based row number and fields of each row, class names of a `label` column if the data set declares them).

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
    chosen = list(range(len(rows))) if count is None else sample(len(rows), count, seed)
    label = rows.features.get("label")
    names = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    return [(i + 1, row) for i, row in zip(chosen, rows.select(chosen))], names
