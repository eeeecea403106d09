"""Several processes as one run: what each of them knows of the others, and how they stay one.

Every process holds all adapters and draws the same random numbers; each works on its share of the data. The gradients
are added up before anything reads them, so rules, clipping and the optimizer decide the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rankloom.errors import RankloomError, StateError
from rankloom.train.rng import rng_state, seed_all, set_rng_state

T = TypeVar("T")


class PeerError(RankloomError, RuntimeError):
    """Another process of this run failed; the message is its own."""


class UntoldError(PeerError):
    """This process failed where it could not tell the others."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees it: number `rank` of `world`; alone by default.

    Every method but `own_random` is a meeting point: each process must call it, in the same order. `device`: where
    tensors meet.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """True for the one process that writes and reports."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """The sum over all processes of each number, in float64."""
        if self.world == 1:
            return list(numbers)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(numbers, dtype=wide, device=self.device)
        dist.all_reduce(total)
        return [float(n) for n in total.tolist()]

    def agree(self, work: Callable[[], T]) -> T:
        """What `work()` gives here, once it is done everywhere. Where it raises in one process it raises in all: there
        its own error, elsewhere a `PeerError` with its message. `work` must not wait for other processes.
        """
        if self.world == 1:
            return work()
        failure: Exception | None = None
        try:
            found = work()
        except Exception as error:
            failure = error
        if not self.sum(failure is not None)[0]:
            return found
        if failure is not None:
            self._every(str(failure))
            raise failure
        told = self._every(None)
        first = next(rank for rank, text in enumerate(told) if text is not None)
        raise PeerError(f"process {first} of {self.world} failed: {told[first]}")

    def meet(self, work: Callable[[], T]) -> T:
        """What `work()` gives, where the work itself waits for the other processes. One that fails cannot tell them: it
        raises an `UntoldError`, ends, and its launcher ends the rest.
        """
        if self.world == 1:
            return work()
        try:
            return work()
        except Exception as error:
            raise UntoldError(f"process {self.rank} of {self.world} failed: {error}") from error

    def from_main(self, value: T) -> T:
        """The main process's value."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self.device)
        return box[0]

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raises `StateError` naming the first entry that is not the same in every process."""
        if self.world == 1:
            return
        every = self._every(dict(values))
        for rank, theirs in enumerate(every):
            for key, value in theirs.items():
                if value != every[0][key]:
                    raise StateError(
                        f"{key} is not the same in all processes: {_short(value)} in process {rank}, "
                        f"{_short(every[0][key])} in process 0; start each with the same command, on files that all see"
                    )

    def spread(self, tensors: Iterable[Tensor]) -> None:
        """Write the main process's values into the tensors of all."""
        for tensor in tensors if self.world > 1 else ():
            sent = tensor.detach().to(self.device).contiguous().reshape(-1).view(torch.uint8)
            if sent.numel():
                dist.broadcast(sent, 0)
                with torch.no_grad():
                    tensor.copy_(sent.view(tensor.dtype).view(tensor.shape))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give each parameter the sum of its gradients over all processes; None stays where no process has one."""
        if self.world == 1:
            return
        each = list(dict.fromkeys(parameters))
        there = self.sum(*(p.grad is not None for p in each))
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter, count in zip(each, there):
            if count:
                groups.setdefault(parameter.dtype, []).append(parameter)
        for group in groups.values():
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([part.detach().reshape(-1).to(self.device) for part in parts])
            dist.all_reduce(flat)
            for parameter, part in zip(group, torch.split(flat, [p.numel() for p in group])):
                parameter.grad = part.view(parameter.shape).to(parameter.device)

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Random numbers of this process's own inside the block (dropout), drawn from those that all share."""
        if self.world == 1:
            yield
            return
        seed = int(torch.randint(2**31, ()))
        before = rng_state()
        seed_all(seed + self.rank)
        try:
            yield
        finally:
            set_rng_state(before)

    def _every(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
