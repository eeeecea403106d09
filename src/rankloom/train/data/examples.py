"""Tokenised records, kept as columns: four bytes a token, in memory or mapped from a table on disk."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from rankloom.train.data.lazy import Lazy
from rankloom.train.data.records import Where

BLOCK = 1024
"""Examples in a block; only the last may hold fewer."""
NO_LABEL = -1
Numbers = np.ndarray[Any, Any]
Runs = tuple[tuple[int, int], ...]
"""Ranges [start, end) of trained tokens, in order and apart."""


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


@dataclass(frozen=True)
class Block:
    """Up to `BLOCK` examples. `ids`: of all, int32 [tokens]; `ends`: where each one's end, int64 [n + 1];
    `runs`: starts and ends of trained ranges in turn, int32; `run_ends`: int64 [n + 1]; `labels`: int32 [n];
    `files`: numbers of the files they come from, int32 [n]; `lines`: int64 [n].
    """

    ids: Numbers
    ends: Numbers
    runs: Numbers
    run_ends: Numbers
    labels: Numbers
    files: Numbers
    lines: Numbers


class Examples(Lazy[Example]):
    """Blocks of examples. `sources`: name and unit of each file; `classified`: each has one label, and no runs."""

    def __init__(self, blocks: Sequence[Block], sources: Sequence[tuple[str, str]], classified: bool) -> None:
        self.blocks, self.sources, self.classified = blocks, tuple(sources), classified
        sizes = [np.diff(block.ends) for block in blocks]
        self.lengths: Numbers = np.concatenate(sizes).astype(np.int32) if sizes else np.zeros(0, np.int32)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Examples that exist already."""
        builder = Builder()
        for x in examples:
            builder.add(x.ids, runs_of(x.trained), x.label, x.where)
        return builder.close()

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, index: int) -> Example:
        number, i = divmod(index, BLOCK)
        block = self.blocks[number]
        ids = array("i", block.ids[block.ends[i] : block.ends[i + 1]].tobytes())
        label = int(block.labels[i])
        runs = block.runs[block.run_ends[i] : block.run_ends[i + 1]].tolist()
        name, unit = self.sources[int(block.files[i])]
        return Example(
            ids,
            b"" if self.classified else flags(len(ids), runs),
            label if self.classified else None,
            Where(name, int(block.lines[i]), unit),
        )

    def where(self, index: int) -> Where:
        """The place of an example, without its tokens."""
        block, i = self.blocks[index // BLOCK], index % BLOCK
        name, unit = self.sources[int(block.files[i])]
        return Where(name, int(block.lines[i]), unit)

    @property
    def trained(self) -> int:
        """Trained tokens of all examples."""
        return int(sum((block.runs[1::2].astype(np.int64) - block.runs[::2]).sum() for block in self.blocks))

    def digest(self) -> str:
        """A fingerprint of all ids, masks and labels."""
        found = hashlib.blake2b(digest_size=16)
        for block in self.blocks:
            for part in (block.ids, block.ends, block.runs, block.run_ends, block.labels):
                found.update(np.ascontiguousarray(part).view(np.uint8).data)
        return found.hexdigest()


def flags(length: int, runs: Sequence[int]) -> bytes:
    """0/1 per token from starts and ends of ranges in turn."""
    found = bytearray(length)
    for start, end in zip(runs[::2], runs[1::2]):
        found[start:end] = b"\1" * (end - start)
    return bytes(found)


def runs_of(trained: Sequence[int]) -> Runs:
    """The ranges of tokens that are trained."""
    marks = np.diff(np.asarray([0, *trained, 0], dtype=np.int8))
    return tuple(zip(np.flatnonzero(marks == 1).tolist(), np.flatnonzero(marks == -1).tolist()))


@dataclass
class Builder:
    """Takes examples one by one; full blocks go to `blocks`, or to whoever overrides `put`."""

    blocks: list[Block] = field(default_factory=list)
    sources: dict[tuple[str, str], int] = field(default_factory=dict)
    classified: bool = False
    _ids: list[Sequence[int]] = field(default_factory=list)
    _runs: list[Runs] = field(default_factory=list)
    _rest: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, ids: Sequence[int], runs: Runs, label: int | None, where: Where) -> None:
        """Take in one example."""
        file = self.sources.setdefault((where.file, where.unit), len(self.sources))
        self.classified = label is not None
        self._ids.append(ids)
        self._runs.append(runs)
        self._rest.append((NO_LABEL if label is None else label, file, where.line))
        if len(self._ids) == BLOCK:
            self._flush()

    def close(self) -> Examples:
        """All that was taken in."""
        if self._ids:
            self._flush()
        return Examples(self.blocks, tuple(self.sources), self.classified)

    def put(self, block: Block) -> None:
        """What becomes of a full block."""
        self.blocks.append(block)

    def _flush(self) -> None:
        rest = np.asarray(self._rest, dtype=np.int64)
        self.put(
            Block(
                ids=_flat(self._ids),
                ends=_ends(self._ids),
                runs=_flat([list(chain.from_iterable(runs)) for runs in self._runs]),
                run_ends=2 * _ends(self._runs),
                labels=rest[:, 0].astype(np.int32),
                files=rest[:, 1].astype(np.int32),
                lines=rest[:, 2].copy(),
            )
        )
        self._ids, self._runs, self._rest = [], [], []


def _flat(parts: Sequence[Sequence[int]]) -> Numbers:
    return np.fromiter(chain.from_iterable(parts), dtype=np.int32, count=sum(map(len, parts)))


def _ends(parts: Sequence[Sequence[Any]]) -> Numbers:
    return np.cumsum([0, *map(len, parts)], dtype=np.int64)
