"""Which adapters are active: a default for everyone, and selections that are local to a block of code.

A local selection belongs to the thread or task that entered it (a context variable), or, where the block stands in a
generator, to that generator's own steps: streams of tokens may be taken in turns, in copied contexts and be closed in
any order. Compiled code can trace neither and reads a mirror that belongs to the thread.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import thread as executors
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from rankloom.core.notes import Notes
from rankloom.ops.segments import Segments

Weight = float | Tensor


@dataclass(frozen=True, slots=True)
class Active:
    """One active adapter: with a weight (number, or tensor by batch row or token), on all rows or on some."""

    name: str
    weight: Weight = 1.0
    rows: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Selection:
    """The adapters that are active in a forward pass, and what gates may know of the batch (`context`).

    `batch`: rows of the batch where rows are named; `segments`: the batch sorted by the numbers of the active adapters,
    where every row has one of them or none.
    """

    active: tuple[Active, ...] = ()
    batch: int | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    segments: Segments | None = None


BASE_ONLY = Selection()


@dataclass(frozen=True, eq=False, slots=True)
class _Entry:
    """A selection that a block of code has entered: found by identity, so blocks may end in any order."""

    selector: Selector
    selection: Selection
    thread: int


_Entries = tuple[_Entry, ...]
_task: contextvars.ContextVar[_Entries] = contextvars.ContextVar("rankloom_selection", default=())


class _Thread(threading.local):
    """Mirror of the entries for compiled code, which cannot trace a ContextVar: per thread, not per task.

    Set on the instance from the start: compiled code would not notice an instance attribute that comes to hide a
    class attribute.
    """

    def __init__(self) -> None:
        self.entries: _Entries = ()


_thread = _Thread()
_TRAVELS = "rankloom_selection"
"""Key of the entries among the objects that autograd hands on to the threads of a backward pass."""


def _announce(entries: _Entries) -> None:
    _thread.entries = entries
    torch._C._stash_obj_in_tls(_TRAVELS, entries)


def _handed_on() -> _Entries:
    """In a thread of autograd's own (recomputation): the entries of whoever called backward."""
    if not torch._C._is_key_in_tls(_TRAVELS):
        return ()
    entries: _Entries = torch._C._get_obj_in_tls(_TRAVELS)
    return entries


class Selector:
    """Shared by all grafted layers of one model; changing the active adapters is one assignment.

    `disabled`: base only, whatever is selected where (adapters are merged); `fused`: False lets every layer take the
    plain path in training, which is slower and keeps more; `reached`: collects the names of sites while somebody asks
    which are reached; `notes`: what adapters tell the rules of a training.
    """

    def __init__(self) -> None:
        self.default = Selection()
        self.disabled = False
        self.fused = True
        self.reached: set[str] | None = None
        self.notes: Notes | None = None
        self._frames: dict[FrameType, list[_Entry]] = {}
        self._entered: dict[_Entry, None] = {}
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {"default": self.default, "disabled": self.disabled, "fused": self.fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)

    def current(self) -> Selection:
        """The selection here and now."""
        if not torch.compiler.is_compiling():
            return self.uncompiled()
        return BASE_ONLY if self.disabled else self._of(_thread.entries)

    def uncompiled(self) -> Selection:
        """`current`, for a caller who knows that nothing compiles it."""
        if self.disabled:
            return BASE_ONLY
        if self._frames and (own := self._of_generator()) is not None:
            return own
        entries = _task.get()
        if not entries and torch._C._current_graph_task_id() != -1:
            entries = _handed_on()
        if entries:
            return self._of(entries)
        if self._entered and not self._warned:
            self._warn_in_executor()
        return self.default

    def _of(self, entries: _Entries) -> Selection:
        for entry in entries:
            if entry.selector is self:
                return entry.selection
        return self.default

    @contextmanager
    def local(self, selection: Selection) -> Iterator[None]:
        """Let `selection` hold inside the block, in this thread, task or generator only."""
        entry = _Entry(self, selection, threading.get_ident())
        owner = _generator_here()
        self._entered[entry] = None
        if owner is None:
            _task.set((entry, *_task.get()))
            _announce(_task.get())
        else:
            self._frames.setdefault(owner, []).append(entry)
            _announce((entry, *_task.get()))
        try:
            yield
        finally:
            del self._entered[entry]
            if owner is None:
                _task.set(tuple(other for other in _task.get() if other is not entry))
            else:
                self._leave(owner, entry)
            _announce(_task.get())

    def _leave(self, owner: FrameType, entry: _Entry) -> None:
        left = [other for other in self._frames[owner] if other is not entry]
        if left:
            self._frames[owner] = left
        else:
            del self._frames[owner]

    def _of_generator(self) -> Selection | None:
        """The selection of the innermost generator that runs here and has entered one."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            found = self._frames.get(frame)
            if found:
                return found[-1].selection
            frame = frame.f_back
        return None

    def _warn_in_executor(self) -> None:
        """An executor's worker knows nothing of the block that handed it the call."""
        workers = {worker.ident for worker in getattr(executors, "_threads_queues", ())}
        elsewhere = any(entry.thread not in workers for entry in self._entered)
        if elsewhere and threading.get_ident() in workers:
            self._warned = True
            warnings.warn(
                "a model is called in an executor's thread while another thread is inside bank.using(…): the selection "
                "does not travel there. Hand it a call that carries its own: executor.submit(bank.bound('name'), x)",
                RuntimeWarning,
                stacklevel=4,
            )


_GENERATORS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def _generator_here() -> FrameType | None:
    """The innermost generator among the callers; those that only make a ``with`` block (contextlib) do not count."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        back = frame.f_back
        if frame.f_code.co_flags & _GENERATORS and (back is None or back.f_code.co_filename != contextlib.__file__):
            return frame
        frame = back
    return None
