"""Batches without end, with a position that a checkpoint can keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from rankloom.errors import DataError, SettingsError, StateError
from rankloom.train.data.batches import Batches
from rankloom.train.processes import Processes
from rankloom.train.rng import rng_state, set_rng_state

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


def stream_of(batches: Source, processes: Processes) -> Stream:
    """The stream over `Batches`, any iterable that can be iterated again, or a function from batch number to batch.

    Several processes take turns: of every `world` batches each takes one. `Batches` made for several, and a loader
    with torch's `DistributedSampler`, are dealt out already.
    """
    found = _whole_stream(batches)
    return found if processes.world == 1 or dealt(batches, processes) else _Turns(found, processes)


def dealt(batches: Source, processes: Processes) -> bool:
    """True where `batches` gives each process batches of its own. Raises `SettingsError` where they are of others."""
    if isinstance(batches, Batches):
        mine, here = (batches.rank, batches.world), (processes.rank, processes.world)
        if min(batches.world, processes.world) > 1 and mine != here:
            raise SettingsError(f"Batches(rank={mine[0]}, world={mine[1]}) in process {here[0]} of {here[1]}")
        return batches.world > 1
    return isinstance(getattr(batches, "sampler", None), torch.utils.data.DistributedSampler)


def _whole_stream(batches: Source) -> Stream:
    if isinstance(batches, Batches):
        return _Ordered(batches)
    if isinstance(batches, Iterable):
        return _Repeated(batches)
    if callable(batches):
        return _Called(batches)
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
    """A function of the batch's number (from 0, over the whole run)."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make
        self.at = 0

    def next(self) -> Any:
        self.at += 1
        return self.make(self.at - 1)

    def state(self) -> dict[str, Any]:
        return {"kind": "called", "at": self.at}

    def restore(self, state: Mapping[str, Any]) -> None:
        _same_kind(state, "called")
        self.at = int(state["at"])


class _Repeated(Stream):
    """Any iterable, over and over.

    The position is the epoch's random state at its beginning and the number of batches taken since: a shuffling
    loader gives the same order again, and the batches taken are skipped.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.number, self.taken = -1, 0
        self.begin: dict[str, Any] = {}
        self.iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        for _ in range(2):
            if self.iterator is None:
                self._open()
            assert self.iterator is not None
            for batch in self.iterator:
                self.taken += 1
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
        self.number, self.taken = self.number + 1, 0
        self.iterator = iter(self.batches)

    @property
    def epoch(self) -> int | None:
        return max(self.number, 0)

    def state(self) -> dict[str, Any]:
        return {"kind": "repeated", "epoch": self.number, "taken": self.taken, "begin": self.begin}

    def restore(self, state: Mapping[str, Any]) -> None:
        _same_kind(state, "repeated")
        if state["epoch"] < 0:
            return
        set_rng_state(state["begin"])
        if "loader" in state["begin"]:
            self.batches.generator.set_state(state["begin"]["loader"].cpu())  # type: ignore[attr-defined]
        self.number = int(state["epoch"]) - 1
        self._open()
        for _ in range(int(state["taken"])):
            if next(self.iterator, self) is self:  # type: ignore[arg-type]
                raise StateError(
                    f"the checkpoint stands at batch {state['taken']} of an epoch, but the data gives only "
                    f"{self.taken}: resume with the same data"
                )
            self.taken += 1


def _same_kind(state: Mapping[str, Any], kind: str) -> None:
    if state["kind"] != kind:
        raise StateError(
            f"the checkpoint was made with batches of another kind ({state['kind']}, now {kind}): "
            "resume with the same data"
        )
