"""Columns of a batch that gates are told: the context of the selection, one call of the model after the other."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from rankloom.core.selection import Selector
from rankloom.errors import SettingsError, suggest

TRAINERS_HINT = "; a Trainer drops columns that the model's forward does not name: remove_unused_columns=False"


class Columns:
    """Hands the columns `names` of what the model is called with to gates, and to the model only where its forward
    names them.

    `lasting`: whether the call that runs belongs to a backward pass that is still to come; its context then holds
    until the next call or `settle`, since gradient checkpointing runs forward passes again. `batch`: the batch in
    hand, for a loss that calls the model with a part of it.

    Raises:
        SettingsError: at a call without one of the columns, naming those that there are.
    """

    def __init__(
        self,
        model: nn.Module,
        selector: Selector,
        names: Sequence[str],
        lasting: Callable[[], bool],
        batch: Callable[[], Any] = lambda: None,
    ) -> None:
        self.names = tuple(names)
        self.selector = selector
        self.lasting = lasting
        self.batch = batch
        self.taken = inspect.signature(model.forward).parameters.keys()
        self._open: list[ExitStack] = []
        self._kept: ExitStack | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def settle(self) -> None:
        """Forget the context of the last call; its backward pass is over."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def close(self) -> None:
        """Leave the model as it was."""
        self.settle()
        for hook in self._hooks:
            hook.remove()

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not self._open:
            self.settle()
        now = self.selector.current()
        context = {**now.context, **{name: self._column(name, kwargs, now.context) for name in self.names}}
        stack = ExitStack()
        stack.enter_context(self.selector.local(replace(now, context=context)))
        self._open.append(stack)
        return args, {k: v for k, v in kwargs.items() if k not in self.names or k in self.taken}

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if not self._open:
            return
        stack = self._open.pop()
        if self.lasting():
            self._kept = stack
        else:
            stack.close()

    def _column(self, name: str, kwargs: Mapping[str, Any], context: Mapping[str, Any]) -> Any:
        batch = self.batch()
        for source in (kwargs, batch if isinstance(batch, Mapping) else {}, context):
            if name in source:
                return source[name]
        there = [str(key) for key in (batch if isinstance(batch, Mapping) else kwargs)]
        raise SettingsError(
            f"context: the batch has no column {name!r}; it has {', '.join(map(repr, there)) or 'none'}"
            f"{suggest(name, there)}{TRAINERS_HINT}"
        )
