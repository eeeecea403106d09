"""Signals in a run that keeps checkpoints: the step is finished and saved, then the run ends.

After SIGTERM or SIGINT the next one of them finds the handlers that were there before the run: it ends a program at
once. What it may interrupt is the writing of a checkpoint, which appears whole or not at all. SIGHUP (a terminal that
went away, which often sends it twice) and SIGUSR1 (a scheduler's notice) never end anything at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rankloom.errors import Interrupted, Terminated
from rankloom.train.processes import Processes

URGENT = (signal.SIGTERM, signal.SIGINT)
HEARD = (*URGENT, *(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name)))


class Leave(BaseException):
    """A signal came while something ran that need not be finished."""


class StopRequest:
    """Whether the run was asked to end; `number`: the signal that asked first."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int] = {}
        self._leaves = False

    def listen(self) -> None:
        """Take the signals' handlers; those that are ignored, or are not Python's, stay as they are."""
        for number in HEARD:
            found = signal.getsignal(number)
            if found not in (signal.SIG_IGN, None):
                self._before[number] = found
                signal.signal(number, self._hear)

    def put_back(self, numbers: Iterable[int] = HEARD) -> None:
        """Put back the handlers that were there."""
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before.pop(number))

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Inside, a signal raises `Leave` at once."""
        self._leaves = True
        try:
            if self.number is not None:
                raise Leave
            yield
        finally:
            self._leaves = False

    def agree(self, processes: Processes) -> bool:
        """Whether the run ends after this step: in all processes if any was asked."""
        heard = processes.sum(*(self.number == number for number in HEARD))
        found = next((number for number, count in zip(HEARD, heard) if count), None)
        if found is not None:  # one that comes while the others are asked is told in the next step
            self.number = found
        return found is not None

    def ending(self, message: str) -> BaseException:
        """What to raise in the end."""
        assert self.number is not None
        text = f"{signal.Signals(self.number).name}: {message}"
        return Interrupted(text) if self.number == signal.SIGINT else Terminated(text, self.number)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name, again = signal.Signals(number).name, ""
        if number in URGENT:
            self.put_back(URGENT)
            again = f"; {name} again ends at once"
        self.number = self.number or number
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{name}: a checkpoint is saved after this step{again}\n".encode())
        if self._leaves:
            raise Leave


@contextmanager
def listening(wanted: bool) -> Iterator[StopRequest]:
    """Hear signals inside the block, if wanted and in the main thread; one that came too late to matter ends it."""
    asked = StopRequest()
    if wanted and threading.current_thread() is threading.main_thread():
        asked.listen()
    try:
        yield asked
    finally:
        asked.put_back()
    if asked.number is not None:
        raise asked.ending("the run was complete")
