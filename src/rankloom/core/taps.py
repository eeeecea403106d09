"""Taps: what a module of the model was called with, for those below it, while its forward runs.

A tapped module puts its input on the list of its thread and takes it off when it returns, so nothing is kept on the
model, calls may nest, and a recomputed block taps again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.method import together
from rankloom.errors import StateError


class Tap:
    """One running forward: its `key` (the path of a module), a `value` (its input), what has been computed from that by
    key (`known`), and what else goes with it (`beside`).
    """

    def __init__(self, key: str, value: Tensor, beside: Any = None) -> None:
        self.key = key
        self.value = value
        self.beside = beside
        self.known: dict[int, Tensor] = {}

    def once(self, key: int, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What `make` gives for the value, made by the first who asks."""
        if key not in self.known:
            self.known[key] = make(self.value)
        return self.known[key]


class _Open(threading.local):
    def __init__(self) -> None:
        self.taps: list[Tap] = []


_open = _Open()


def tapped(key: str) -> Tap | None:
    """The running forward of this key in this thread, innermost first."""
    return next((tap for tap in reversed(_open.taps) if tap.key == key), None)


def open_tap(tap: Tap, lasting: bool = False) -> None:
    """Let those below know; `lasting`: a backward pass may run parts of this forward again, when it is over."""
    if lasting:
        last = _last(tap.key)
        pending: weakref.WeakSet[_Graph] = weakref.WeakSet() if last is None else last[1]
        graph = _Graph()
        for made in tap.known.values():
            if made.requires_grad:
                made.register_hook(graph.walked)  # type: ignore[no-untyped-call]
                pending.add(graph)
        torch._C._stash_obj_in_tls(_name(tap.key), (tap, pending))
    _open.taps.append(tap)


def close_tap(key: str) -> Tap | None:
    """The innermost forward of `key` is over."""
    found = tapped(key)
    if found is not None:
        _open.taps.remove(found)
    return found


def lasting_tap(key: str) -> Tap | None:
    """In a recomputation (gradient checkpointing): the last forward of this key that a backward pass may follow.

    Raises `StateError` where several wait for theirs: which of them is recomputed cannot be told.
    """
    last = None if torch._C._current_graph_task_id() == -1 else _last(key)
    if last is None:
        return None
    tap, pending = last
    waiting = sum(not graph.over for graph in pending)
    if waiting > 1:
        raise StateError(
            f"{waiting} forward passes wait for a backward pass, and gradient checkpointing cannot tell whose first "
            "pass it needs: call backward after each, or switch checkpointing off"
        )
    return tap


class _Graph:
    """Lives as long as what was computed from a tap is in some graph; `over`: a backward pass came through."""

    def __init__(self) -> None:
        self.over = False

    def walked(self, gradient: Tensor) -> None:
        """A gradient has arrived."""
        self.over = True


def _name(key: str) -> str:
    return f"rankloom_tap_{key}"


def _last(key: str) -> tuple[Tap, weakref.WeakSet[_Graph]] | None:
    """Autograd hands such objects on to the threads of a backward pass."""
    name = _name(key)
    found: Any = torch._C._get_obj_in_tls(name) if torch._C._is_key_in_tls(name) else None
    return found  # type: ignore[no-any-return]


def tap(model: nn.Module, paths: Iterable[str]) -> Callable[[], None]:
    """Tap these modules of `model`; returns the undo."""
    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(partial(_enter, path), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(_leave, path), always_call=True))
    return together([handle.remove for handle in handles])


def _enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    open_tap(Tap(path, args[0] if args else next(iter(kwargs.values()))))


def _leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
    close_tap(path)
