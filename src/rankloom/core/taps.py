"""Taps: what a module of the model was called with, for those below it, while its forward runs.

A tapped module puts its input on the list of its thread and takes it off when it returns, so nothing is kept on the
model, calls may nest, and a recomputed block taps again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from rankloom.core.method import together


class Tap:
    """One running forward: the `path` of its module, its input `value`, and what has been computed from it by `key`."""

    def __init__(self, path: str, value: Tensor) -> None:
        self.path = path
        self.value = value
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


def tapped(path: str) -> Tap | None:
    """The running forward of the module `path` in this thread, innermost first."""
    for tap in reversed(_open.taps):
        if tap.path == path:
            return tap
    return None


def open_tap(path: str, value: Tensor) -> None:
    """Let those below know what `path` works on."""
    _open.taps.append(Tap(path, value))


def close_tap(path: str) -> None:
    """The innermost forward of `path` is over."""
    for at in range(len(_open.taps) - 1, -1, -1):
        if _open.taps[at].path == path:
            del _open.taps[at]
            return


def tap(model: nn.Module, paths: Iterable[str]) -> Callable[[], None]:
    """Tap these modules of `model`; returns the undo."""
    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(partial(_enter, path), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(_leave, path), always_call=True))
    return together([handle.remove for handle in handles])


def _enter(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    open_tap(path, args[0] if args else next(iter(kwargs.values())))


def _leave(path: str, module: nn.Module, args: Any, output: Any) -> None:
    close_tap(path)
