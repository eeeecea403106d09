"""What a disk may hold after the power went: replayed from the log of operations.

A file's bytes are sure once it was synced, a folder's entries once the folder was. What was not may be there or not,
each effect for itself, and bytes that were not synced may be there in part. This is more than any one file system does.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rankloom.files import disk
from rankloom.files.disk import Operation


@dataclass(eq=False)
class File:
    """A file as the disk knows it; `data`: what is sure, `torn`: what else its bytes may be."""

    data: bytes = b""
    torn: list[bytes] = field(default_factory=list)


@dataclass(eq=False)
class Folder:
    """A folder as the disk knows it: entries that are sure."""

    entries: dict[str, Node] = field(default_factory=dict)


Node = File | Folder
Change = tuple[Folder, str, Node | None]
"""An entry of a folder set, or with None removed."""


class Disk:
    """The folder `root` and what is below it; `do` performs an operation, `states` says what a crash may leave."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = Folder()
        self.seen: dict[Path, Node] = {root: self.top}
        self.unsure: list[tuple[Change, ...]] = []
        self._written: dict[File, bytes] = {}

    def do(self, op: Operation) -> None:
        """Perform one logged operation."""
        getattr(self, f"_{op.kind}")(op)

    def states(self, most: int, draw: random.Random) -> Iterator[dict[Path, bytes | None]]:
        """What may be there: bytes of each file, None for a folder; all subsets, or `most` of them drawn."""
        count = len(self.unsure)
        every = (
            range(1 << count) if count <= 20 and 1 << count <= most else [draw.getrandbits(count) for _ in range(most)]
        )
        torn = [file for file in self._written if file.torn]
        for chosen in every:
            kept = [c for i, changes in enumerate(self.unsure) if chosen >> i & 1 for c in changes]
            for variants in itertools.product(*(file.torn for file in torn[-1:])):
                contents = dict(zip(torn[-1:], variants)) | {f: draw.choice(f.torn) for f in torn[:-1]}
                yield dict(self._walk(self.top, self.root, kept, contents))

    def _walk(
        self, folder: Folder, path: Path, kept: Sequence[Change], contents: dict[File, bytes]
    ) -> Iterator[tuple[Path, bytes | None]]:
        entries = dict(folder.entries)
        for owner, name, node in kept:
            if owner is folder:
                if node is None:
                    entries.pop(name, None)
                else:
                    entries[name] = node
        for name, node in entries.items():
            if isinstance(node, Folder):
                yield path / name, None
                yield from self._walk(node, path / name, kept, contents)
            else:
                yield path / name, contents.get(node, node.data)

    def _change(self, *changes: tuple[Path, Node | None]) -> None:
        made = []
        for path, node in changes:
            owner = self.seen[path.parent]
            assert isinstance(owner, Folder)
            made.append((owner, path.name, node))
        self.unsure.append(tuple(made))

    def _make(self, op: Operation) -> None:
        self.seen[op.path] = Folder()
        self._change((op.path, self.seen[op.path]))

    def _write(self, op: Operation) -> None:
        file = File(torn=_torn(op.data))
        self.seen[op.path] = file
        self._written[file] = op.data
        self._change((op.path, file))

    def _sync(self, op: Operation) -> None:
        node = self.seen.get(op.path)
        if isinstance(node, File):
            node.data, node.torn = self._written[node], []
        elif isinstance(node, Folder):
            still = []
            for changes in self.unsure:
                if all(owner is node for owner, _, _ in changes):
                    for _, name, entry in changes:
                        _set(node, name, entry)
                else:
                    still.append(changes)
            self.unsure = still

    def _rename(self, op: Operation) -> None:
        assert op.to is not None
        node = self.seen[op.path]
        self._change((op.path, None), (op.to, node))
        self._move(op.path, op.to)

    def _exchange(self, op: Operation) -> None:
        assert op.to is not None
        self._change((op.path, self.seen[op.to]), (op.to, self.seen[op.path]))
        aside = op.path.with_name("aside")
        for path, to in ((op.path, aside), (op.to, op.path), (aside, op.to)):
            self._move(path, to)

    def _remove(self, op: Operation) -> None:
        """Entry by entry, as the system does it: each may be lost."""
        below = sorted((p for p in self.seen if p.is_relative_to(op.path)), key=lambda p: -len(p.parts))
        for path in below:
            self._change((path, None))
        for path in below:
            del self.seen[path]

    def _move(self, path: Path, to: Path) -> None:
        for old in [p for p in self.seen if p.is_relative_to(path)]:
            self.seen[to / old.relative_to(path)] = self.seen.pop(old)


def _set(folder: Folder, name: str, node: Node | None) -> None:
    if node is None:
        folder.entries.pop(name, None)
    else:
        folder.entries[name] = node


def _torn(data: bytes) -> list[bytes]:
    """What may be there of bytes that were written and not synced."""
    half = len(data) // 2
    return [data, b"", data[:half], data[:-1], bytes(len(data)), data[:half] + bytes(len(data) - half)]


def logged(job: Callable[[], object]) -> list[Operation]:
    """Every operation of `job`, which is performed."""
    log: list[Operation] = []

    def note(operation: Operation, perform: Callable[[], None]) -> None:
        perform()
        log.append(operation)

    with disk.watched(note):
        job()
    return log
