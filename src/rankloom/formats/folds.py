"""What was folded into the base, in a native folder: rows in the config, tensors beside those of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.bank import Bank
from rankloom.core.fingerprint import check_print, fingerprint
from rankloom.core.journal import Journal, keys_of
from rankloom.core.merging import check_fits
from rankloom.errors import FileError, TargetError
from rankloom.formats.entry import Entry, plain
from rankloom.formats.manifest import Source

FIELD = "journal"
PREFIX = "journal:"
"""Before the keys of a journal's tensors; the name of a site has no colon."""


def entries(journal: Journal) -> list[Entry]:
    """The journal's tensors."""
    return [plain(f"{PREFIX}{key}", tensor) for key, tensor in journal.tensors().items()]


def config(bank: Bank) -> dict[str, Any]:
    """The config field: each distinct row once, the rows of the folds in order, and the base as they left it."""
    rows = bank.journal.rows()
    distinct = [row for i, row in enumerate(rows) if row not in rows[:i]]
    return {FIELD: {"rows": distinct, "folds": [distinct.index(r) for r in rows], "after": fingerprint(bank.model)}}


@dataclass(frozen=True)
class Folds:
    """The journal of a folder, before its tensors are made. `after`: fingerprint of the base with the folds in it."""

    rows: list[dict[str, Any]]
    after: dict[str, Any]
    where: str

    @classmethod
    def of(cls, source: Source) -> Folds | None:
        """The journal that the config names; None if it names none. Raises `FileError` where it is not one."""
        data = source.config.get(FIELD)
        if data is None:
            return None
        try:
            rows = [data["rows"][_index(i)] for i in data["folds"]]
            known = {f"{PREFIX}{key}" for key, *_ in keys_of(rows)}
            wrong = check_print(data["after"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise FileError(f"{source.config_file}: {FIELD!r} is no journal of folds: {error}") from error
        if wrong is not None:
            raise FileError(f"{source.config_file}: {FIELD!r}: 'after' is no fingerprint: {wrong}")
        missing = sorted(known - source.header.keys())
        if missing:
            raise FileError(f"{source.weights_file}: tensor {missing[0]!r} of the journal is missing")
        return cls(rows, data["after"], source.config_file)

    def expected(self, source: Source, model: nn.Module) -> dict[str, Tensor]:
        """The journal's tensors as they must be, on the meta device. Raises `FileError` where they do not fit."""
        said = {key: source.header[f"{PREFIX}{key}"] for key, *_ in keys_of(self.rows)}
        try:
            check_fits(model, self.rows, {key: header.shape for key, header in said.items()})
        except (TargetError, KeyError, IndexError) as error:
            raise FileError(f"{source.weights_file}: {error}") from error
        return {f"{PREFIX}{k}": torch.empty(h.shape, dtype=h.dtype, device="meta") for k, h in said.items()}

    def journal(self, tensors: Mapping[str, Tensor]) -> Journal:
        """The journal, its tensors taken from those of the file."""
        own = {key.removeprefix(PREFIX): t for key, t in tensors.items() if key.startswith(PREFIX)}
        return Journal.of({"base": None, "folds": self.rows, "tensors": own})


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no row")
    return value
