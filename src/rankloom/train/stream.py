"""Batches without end, with a position that a checkpoint can keep."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rankloom.errors import DataError, SettingsError, StateError
from rankloom.train.data.batches import Batches
from rankloom.train.digest import digest, opaque
from rankloom.train.processes import Processes
from rankloom.train.rng import Snapshot, rng_state, same_state, set_rng_state, snapshot

LOOKED_AT = 64
"""Batches of a list that are compared at a resume, evenly spread; besides those that the epoch has taken."""
Source = Iterable[Any] | Callable[[int], Any]


class Stream(ABC):
    """What a run draws its batches from."""

    @abstractmethod
    def next(self) -> Any:
        """The next batch; after the last one of the data the first comes again."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The position, for `restore`."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a position. May draw random numbers: put their state back afterwards."""

    @property
    def epoch(self) -> int | None:
        """Number of the epoch that the next batch belongs to, where there are epochs."""
        return None


def stream_of(batches: Source, processes: Processes, kept: bool = True) -> Stream:
    """The stream over `Batches`, any iterable that can be iterated again, or a function from batch number to batch.

    Several processes take turns: of every `world` batches each takes one. `Batches` made for several, and a loader
    with torch's `DistributedSampler`, are dealt out already.

    Where a checkpoint is resumed from, the stream compares its data with those that the checkpoint has seen; of several
    processes the main one, whose checkpoint it is. `kept`: positions will be asked for.
    """
    found = _whole_stream(batches, _Use(kept, processes.main))
    return found if processes.world == 1 or dealt(batches, processes) else _Turns(found, processes)


def dealt(batches: Source, processes: Processes) -> bool:
    """True where `batches` gives each process batches of its own. Raises `SettingsError` where they are of others."""
    if isinstance(batches, Batches):
        mine, here = (batches.rank, batches.world), (processes.rank, processes.world)
        if min(batches.world, processes.world) > 1 and mine != here:
            raise SettingsError(f"Batches(rank={mine[0]}, world={mine[1]}) in process {here[0]} of {here[1]}")
        return batches.world > 1
    return isinstance(getattr(batches, "sampler", None), torch.utils.data.DistributedSampler)


@dataclass(frozen=True)
class _Use:
    """What a stream is for: whether checkpoints are `kept`, and whether this process `compares` data with one."""

    kept: bool
    compares: bool


def _whole_stream(batches: Source, use: _Use) -> Stream:
    if isinstance(batches, Batches):
        return _Ordered(batches)
    if isinstance(batches, Iterable):
        return _Repeated(batches, use)
    if callable(batches):
        return _Called(batches, use)
    raise SettingsError(
        f"batches is a {type(batches).__name__}: give a list or DataLoader of batches, a function step → batch, "
        "or rankloom.train.data.Batches"
    )


class _Ordered(Stream):
    """`Batches`: any position is reached without replay."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def next(self) -> Any:
        self.batches.step += 1
        return self.batches.batch_at(self.batches.step - 1)

    @property
    def epoch(self) -> int | None:
        return self.batches.epoch

    def state(self) -> dict[str, Any]:
        return {"kind": "ordered", "at": self.batches.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        _same_kind(state, "ordered")
        self.batches.restore(state["at"])


class _Turns(Stream):
    """Of every `world` batches the one of this process. The position is that of all, so it suits any number."""

    def __init__(self, stream: Stream, processes: Processes) -> None:
        self.stream, self.processes = stream, processes

    def next(self) -> Any:
        return [self.stream.next() for _ in range(self.processes.world)][self.processes.rank]

    @property
    def epoch(self) -> int | None:
        return self.stream.epoch

    def state(self) -> dict[str, Any]:
        return self.stream.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self.stream.restore(state)


class _Called(Stream):
    """A function of the batch's number (from 0, over the whole run).

    Its last batch is kept by digest, with the random state that it was made in: a resumed run makes it once more.
    """

    def __init__(self, make: Callable[[int], Any], use: _Use) -> None:
        self.make = make
        self.use = use
        self.at = 0
        self.begin: Snapshot | None = None
        self.last = ""

    def next(self) -> Any:
        self.begin = snapshot() if self.use.kept else None
        batch = self.make(self.at)
        self.at += 1
        self.last = digest(batch) if self.use.kept else ""
        return batch

    def state(self) -> dict[str, Any]:
        begin = {} if self.begin is None else rng_state(self.begin)
        return {"kind": "called", "at": self.at, "begin": begin, "last": self.last}

    def restore(self, state: Mapping[str, Any]) -> None:
        _same_kind(state, "called")
        self.at, self.last = int(state["at"]), state["last"]
        if not self.at or not self.use.compares:
            return
        _tell_opaque(state["last"])
        set_rng_state(state["begin"])
        self.begin = snapshot()
        found = self._again(state)
        if found != state["last"]:
            _refuse(f"batch {self.at - 1} of the function", found == self._again(state))

    def _again(self, state: Mapping[str, Any]) -> str:
        set_rng_state(state["begin"])
        return digest(self.make(self.at - 1))


@dataclass(frozen=True)
class _Seen:
    """Digests of the batches of an epoch so far: of the first, of the last, and of all together."""

    first: str = ""
    last: str = ""
    all: str = ""

    def and_(self, batch: Any) -> _Seen:
        """With one more batch."""
        found = digest(batch)
        return _Seen(self.first or found, found, digest(self.all, found))


class _Repeated(Stream):
    """Any iterable, over and over.

    The position is the epoch's random state at its beginning and the number of batches taken since: a shuffling
    loader gives the same order again, and the batches taken are skipped. They are compared too: the first and the last
    one, each made in the random state that it was made in, and all where the data draw no random numbers.
    """

    def __init__(self, batches: Iterable[Any], use: _Use) -> None:
        self.batches = batches
        self.use = use
        self.number, self.taken = -1, 0
        self.begin: dict[str, Any] = {}
        self.before: Snapshot | None = None
        self.seen = _Seen()
        self.iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        for _ in range(2):
            if self.iterator is None:
                self._open()
            self.before = snapshot() if self.use.kept else None
            for batch in self._rest():
                self._took(batch, self.use.kept)
                return batch
            self.iterator = None
            if self.taken == 0:
                break
        again = "" if self.number < 1 else f" after {self.number} times through"
        raise DataError(
            f"batches is empty{again}: a {type(self.batches).__name__} gave no batch. An iterator or generator can be "
            "used once only: give a list, a DataLoader, or a function step → batch"
        )

    def _open(self) -> None:
        self.begin = rng_state()
        generator = getattr(self.batches, "generator", None)
        if isinstance(generator, torch.Generator):
            self.begin["loader"] = generator.get_state()
        self.number, self.taken, self.seen = self.number + 1, 0, _Seen()
        self.iterator = iter(self.batches)

    def _rest(self) -> Iterator[Any]:
        assert self.iterator is not None
        return self.iterator

    def _took(self, batch: Any, noted: bool) -> None:
        self.taken += 1
        if noted:
            self.seen = self.seen.and_(batch)

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What can be known of the data without drawing from them."""
        return _about(self.batches)

    @property
    def epoch(self) -> int | None:
        return max(self.number, 0)

    def state(self) -> dict[str, Any]:
        return {
            "kind": "repeated",
            "epoch": self.number,
            "taken": self.taken,
            "begin": self.begin,
            "before": {} if self.before is None else rng_state(self.before),
            "seen": vars(self.seen),
            "about": self.about,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        _same_kind(state, "repeated")
        for what, value in state["about"].items() if self.use.compares else ():
            if self.about[what] != value:
                kind = type(self.batches).__name__
                raise _other_data(f"the {what} of the {kind} is {self.about[what]} here and {value} there")
        if state["epoch"] < 0:
            return
        _tell_opaque(state["seen"]["first"] if self.use.compares else "")
        drew = self._skip(state)
        there, here = _Seen(**state["seen"]), self.seen
        if not self.use.compares or here == there or (drew and (here.first, here.last) == (there.first, there.last)):
            return
        used_up = self.iterator is self.batches
        if not used_up:
            self._skip(state)
        what = f"one of the first {state['taken']} batches of epoch {state['epoch']}"
        _refuse(what, repeatable=used_up or self.seen == here)

    def _skip(self, state: Mapping[str, Any]) -> bool:
        """Go to the position; whether the batches behind the first drew random numbers."""
        set_rng_state(state["begin"])
        if "loader" in state["begin"]:
            self.batches.generator.set_state(state["begin"]["loader"].cpu())  # type: ignore[attr-defined]
        self.number, drew = int(state["epoch"]) - 1, False
        self._open()
        for number in range(int(state["taken"])):
            if number == state["taken"] - 1:
                set_rng_state(state["before"])
            self.before = snapshot()
            batch = next(self._rest(), self)
            if batch is self:
                raise _other_data(
                    f"the checkpoint stands at batch {state['taken']} of an epoch, but the data gives only {self.taken}"
                )
            self._took(batch, True)
            drew = drew or (number > 0 and not same_state(self.before, snapshot()))
        return drew


def _about(batches: Iterable[Any]) -> dict[str, Any]:
    """What can be known of an iterable without drawing from it: its length, and of a list some of its content."""
    try:
        found: dict[str, Any] = {"length": len(batches)}  # type: ignore[arg-type]
    except TypeError:
        found = {"length": None}
    content = None
    if isinstance(batches, (list, tuple)) and batches:
        spread = range(0, len(batches), -(-len(batches) // LOOKED_AT))
        content = digest(*(batches[i] for i in spread))
    return {**found, "content": content}


def _refuse(what: str, repeatable: bool) -> None:
    """Other data are an error; data that differ whenever they are drawn cannot be known, and the risk is told."""
    if repeatable:
        raise _other_data(f"{what} is another one here")
    warnings.warn(
        f"{what} is another one each time that it is drawn, random state restored or not: whether the data are those "
        "of the checkpoint cannot be known, and what follows is not the run that was interrupted",
        stacklevel=2,
    )


def _tell_opaque(found: str) -> None:
    if kind := opaque(found):
        warnings.warn(
            f"the batches hold a {kind}, which is not looked into: whether the data are those of the checkpoint cannot "
            "be known",
            stacklevel=2,
        )


def _other_data(what: str) -> StateError:
    """What to raise where a checkpoint has seen other data than there are."""
    return StateError(
        f"other data than the checkpoint's: {what}. Resume with the same data in the same order, or start anew with "
        "another out="
    )


def _same_kind(state: Mapping[str, Any], kind: str) -> None:
    if state["kind"] != kind:
        raise StateError(
            f"the checkpoint was made with batches of another kind ({state['kind']}, now {kind}): "
            "resume with the same data"
        )
