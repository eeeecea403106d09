"""Which split an example belongs to: a property of what it asks, never of how it was drawn."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

from rankloom.errors import SettingsError, suggest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def split_of(key: str) -> Split:
    """The split that owns `key`: 80 % train, 10 % validation, 10 % test, by a keyless hash of the text.

    Two examples with the same key always fall in the same split, whatever the task, seed or phrasing.
    """
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") % 10
    return "test" if bucket == 9 else "validation" if bucket == 8 else "train"


def check_split(split: str) -> Split:
    """`split` itself, or a `SettingsError` with the nearest valid name."""
    if split not in SPLITS:
        raise SettingsError(f"there is no split {split!r}{suggest(split, SPLITS)}")
    return split
