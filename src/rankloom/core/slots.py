"""Slots: where the adapters of a layer are registered, and parameters that are read with their changes.

A layer slot changes what the layer's `forward` returns; a parameter slot is a property on the generated class, so any
code that reads the parameter gets the change, and the parameter itself stays where it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.kinds import Bare, Kind
from rankloom.core.memo import Memo
from rankloom.core.packing import Stacks
from rankloom.core.selection import Active, Selector
from rankloom.core.shared import Borrower, Shared
from rankloom.errors import StateError


class Anchor:
    """What a grafted layer knows of its bank: the selector, its own name, its kind (None: only parameter slots); and
    what it has learnt while running.
    """

    def __init__(self, selector: Selector, name: str) -> None:
        self.selector = selector
        self.name = name
        self.kind: Kind | None = None
        self.stacks = Stacks()
        self.memo = Memo()
        self.inside: set[str] = set()
        """Parameters that have been read in a call of the layer."""
        self.outside: set[str] = set()
        """Parameters that have been read with no call of the layer running."""


def anchor_of(layer: nn.Module) -> Anchor:
    """The anchor of a grafted layer."""
    anchor: Anchor = layer.__dict__["_rankloom"]
    return anchor


def slot_table(layer: nn.Module, slot: str) -> dict[str, Adapter]:
    """Adapters of `layer` at `slot`, by adapter name."""
    slots = layer._modules.get("adapters")
    table = None if slots is None else slots._modules.get(slot)
    return {} if table is None else table._modules  # type: ignore[return-value]


class _Values(threading.local):
    """Effective parameters already computed inside the running forward of their owner, by owner id."""

    def __init__(self) -> None:
        self.scopes: dict[int, dict[tuple[str, bool], Tensor]] = {}


_values = _Values()


@contextmanager
def computed_once(owner: nn.Module) -> Iterator[None]:
    """Each effective parameter of `owner` is computed once inside the block."""
    outer = _values.scopes.get(id(owner))
    _values.scopes[id(owner)] = {}
    try:
        yield
    finally:
        if outer is None:
            del _values.scopes[id(owner)]
        else:
            _values.scopes[id(owner)] = outer


def parameter_property(name: str) -> property:
    """Reads the parameter `name` with the change of every active adapter."""

    def read(self: nn.Module) -> Tensor | None:
        return _effective(self, name)

    return property(read)


def unseen_by_calls(layer: nn.Module, key: str) -> bool:
    """Whether a parameter has only ever been read past the calls of its layer; False where nothing is known yet."""
    anchor: Anchor | None = layer.__dict__.get("_rankloom")
    return anchor is not None and key in anchor.outside and key not in anchor.inside


def _effective(owner: nn.Module, key: str) -> Tensor | None:
    value: Tensor | None = owner._parameters.get(key)
    value = owner._buffers.get(key) if value is None else value
    anchor: Anchor | None = owner.__dict__.get("_rankloom")
    if value is None or anchor is None:
        return value
    selector, name = anchor.selector, f"{anchor.name}.{key}" if anchor.name else key
    if selector.reached is not None:
        selector.reached.add(name)
    selection = selector.current()
    table = slot_table(owner, key)
    if not any(active.name in table for active in selection.active):
        return value
    scope = None if torch.compiler.is_compiling() else _values.scopes.get(id(owner))
    if not torch.compiler.is_compiling():
        (anchor.outside if scope is None else anchor.inside).add(key)
    hooked = "_hf_hook" in owner.__dict__
    if value.is_meta or (hooked and scope is None):
        return value  # there is nothing to compute with; or accelerate moves the parameter itself
    grad = torch.is_grad_enabled()
    if scope is not None and (key, grad) in scope:
        return scope[key, grad]
    base = Base(Bare(key), owner, selection.context, selector.notes)
    out: Tensor = value
    for active in selection.active:
        adapter = table.get(active.name)
        if adapter is not None:
            _same_for_all_rows(name, active)
            if hooked:
                bring_home(adapter)
            out = adapter.add(out, None, value, base, active.weight)
    if scope is not None:
        scope[key, grad] = out
    return out


def _same_for_all_rows(name: str, active: Active) -> None:
    if active.rows is not None or (isinstance(active.weight, Tensor) and active.weight.ndim):
        raise StateError(
            f"per-row adapters: {name} is a bare parameter, the same for all rows; "
            f"adapter {active.name!r} can be active there only for the whole batch"
        )


def bring_home(adapter: Adapter) -> None:
    """Keep the tensors of an adapter in memory: an offload hook of their own would give them to `forward` alone."""
    for module in [m for part in adapter.modules() for m in (part, *_lenders(part))]:
        hook = module.__dict__.get("_hf_hook")
        if getattr(hook, "offload", False):
            hook.pre_forward(module)  # type: ignore[union-attr]
            for key in ("_hf_hook", "_old_forward", "forward"):
                module.__dict__.pop(key, None)


def _lenders(part: nn.Module) -> list[Shared]:
    return [shared for shared, _ in part._borrowed.values()] if isinstance(part, Borrower) else []


@contextmanager
def present(layer: nn.Module) -> Iterator[None]:
    """The layer's weights in memory inside the block, also when an offload hook keeps them elsewhere."""
    hook: Any = layer.__dict__.get("_hf_hook")
    if hook is None or not getattr(hook, "offload", False):
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)
