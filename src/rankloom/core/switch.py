"""Which adapters speak: a default for everyone, and a selection local to a thread or task."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rankloom.ops.segments import Segments

Weight = float | Tensor


@dataclass(frozen=True, slots=True)
class Voice:
    """One adapter that speaks: with a weight (number, or tensor by batch row or token), on all rows or on some."""

    name: str
    weight: Weight = 1.0
    rows: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Voices:
    """Who speaks in one forward pass, and what gates may know of the batch.

    `segments`: the batch sorted by the speakers' numbers, where every row has one of them or none.
    """

    speakers: tuple[Voice, ...] = ()
    batch: int | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    segments: Segments | None = None


SILENCE = Voices()
Selection = tuple[tuple["Switch", Voices], ...]
_task: contextvars.ContextVar[Selection] = contextvars.ContextVar("rankloom_selection", default=())


class _Thread(threading.local):
    """Mirror of the selection for compiled code, which cannot trace a ContextVar: per thread, not per task.

    Set on the instance from the start: compiled code would not notice an instance attribute that comes to hide a
    class attribute.
    """

    def __init__(self) -> None:
        self.selection: Selection = ()


_thread = _Thread()
_TRAVELS = "rankloom_selection"
"""Key of the selection among the objects that autograd hands on to the threads of a backward pass."""


def _announce(selection: Selection) -> None:
    _thread.selection = selection
    torch._C._stash_obj_in_tls(_TRAVELS, selection)


def _selection() -> Selection:
    """The selection of this task; in a thread of autograd's own (recomputation), that of whoever called backward."""
    mine = _task.get()
    if mine or torch._C._current_graph_task_id() == -1 or not torch._C._is_key_in_tls(_TRAVELS):
        return mine
    handed_on: Selection = torch._C._get_obj_in_tls(_TRAVELS)
    return handed_on


class Switch:
    """Shared by all grafted layers of one model; changing who speaks is one assignment.

    `fused`: False lets every layer take the plain path in training, which is slower and keeps more.
    """

    def __init__(self) -> None:
        self.default = Voices()
        self.muted = False
        self.fused = True
        self.heard: set[str] | None = None

    def voices(self) -> Voices:
        """Who speaks here and now: nobody while adapters are merged, whatever is selected where."""
        if self.muted:
            return SILENCE
        selection = _thread.selection if torch.compiler.is_compiling() else _selection()
        for switch, voices in selection:
            if switch is self:
                return voices
        return self.default

    @contextmanager
    def local(self, voices: Voices) -> Iterator[None]:
        """Let `voices` speak inside the block, in this thread or task only."""
        token = _task.set(((self, voices), *_task.get()))
        _announce(_task.get())
        try:
            yield
        finally:
            _task.reset(token)
            _announce(_task.get())
