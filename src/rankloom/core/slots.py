"""Slots: where the adapters of a layer are registered, and parameters that are read with their changes.

A layer slot changes what the layer's `forward` returns, and what the model's code reads that takes the layer's weight
or bias without calling it; a parameter slot changes the parameter for everyone, its own layer too. Both are properties
on the generated class: the parameter itself stays where it was.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.kinds import Bare, Kind
from rankloom.core.memo import Memo
from rankloom.core.packing import Stacks
from rankloom.core.read import Read
from rankloom.core.selection import Active, Selector
from rankloom.core.shared import Borrower, Shared
from rankloom.core.site import LAYER
from rankloom.errors import NotMergeable, RankloomError, StateError
from rankloom.store.base import Packed
from rankloom.store.bridges import bridge_of

T = TypeVar("T")
CALL = nn.Module._call_impl.__code__
"""What runs whenever a module is called."""


class Anchor:
    """What a grafted layer knows of its bank: the selector, its own name, its kind (None: only parameter slots); and
    what it has learnt while running. `traced`: compiled code is in its own forward.
    """

    def __init__(self, selector: Selector, name: str) -> None:
        self.selector = selector
        self.name = name
        self.kind: Kind | None = None
        self.stacks = Stacks()
        self.memo = Memo()
        self.traced = False
        self.moving: set[str] = set()
        """Adapters of the layer slot whose change depends on its input."""
        self.inside: set[str] = set()
        """Parameters that have been read in a call of the layer."""
        self.outside: set[str] = set()
        """Parameters that have been read with no call of the layer running, or `LAYER`: the weight of a layer slot."""


def anchor_of(layer: nn.Module) -> Anchor:
    """The anchor of a grafted layer."""
    anchor: Anchor = layer.__dict__["_rankloom"]
    return anchor


def changed(layer: nn.Module) -> None:
    """The layer's tensors or adapters are others now: let go of what it was found to be."""
    anchor: Anchor | None = layer.__dict__.get("_rankloom")
    if anchor is not None:
        anchor.memo.known = None


def slot_table(layer: nn.Module, slot: str) -> dict[str, Adapter]:
    """Adapters of `layer` at `slot`, by adapter name."""
    slots = layer._modules["adapters"] if "adapters" in layer._modules else None  # noqa: SIM401  scripted: no get
    table = None if slots is None else slots._modules.get(slot)
    return {} if table is None else table._modules  # type: ignore[return-value]


class _Values(threading.local):
    """Effective parameters already computed inside the running forward of their owner, by owner id; the layer whose
    own forward runs.
    """

    def __init__(self) -> None:
        self.scopes: dict[int, dict[tuple[str, bool], Tensor]] = {}
        self.running: nn.Module | None = None


_values = _Values()


def run(layer: nn.Module, below: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the layer returns below its adapters: in there it reads its own weight as it is."""
    if torch.compiler.is_compiling():  # a thread's own values cannot be traced
        anchor = anchor_of(layer)
        anchor.traced = True
        try:
            return below(layer, *args, **kwargs)
        finally:
            anchor.traced = False
    before, _values.running = _values.running, layer
    try:
        return below(layer, *args, **kwargs)
    finally:
        _values.running = before


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


def parameter_property(key: str, slot: bool, layered: bool) -> property:
    """Reads the parameter `key`: of a parameter slot with its changes; where the model runs, but for the layer's own
    forward, with those of the layer slot too.
    """

    def read(self: nn.Module) -> Tensor | None:
        value = _effective(self, key) if slot else self._parameters.get(key)
        anchor: Anchor | None = self.__dict__.get("_rankloom")
        if not layered or value is None or anchor is None or _inside(self, anchor) or not _model_runs():
            return value
        return _read(self, anchor, key, value)

    return property(read)


def flat_weights() -> property:
    """The list of weights that a recurrent layer computes with, as they are read."""

    def read(self: nn.RNNBase) -> list[Tensor]:
        return [getattr(self, key) for key in self._flat_weights_names]

    return property(read, lambda self, value: None)


def moves(adapter: Adapter, base: Base) -> bool:
    """Whether the change depends on the layer's input."""
    try:
        return adapter.thin(base, None) is None and type(adapter).delta is Adapter.delta
    except RankloomError:
        return True


def own_bias(layer: nn.Module) -> Tensor | None:
    """The bias that the layer's own forward reads."""
    return _effective(layer, "bias") if "bias" in layer.rankloom_parameters else layer._parameters.get("bias")  # type: ignore[operator]


def _model_runs() -> bool:
    """Whether the code that reads is called by some module: people and tools that look at a layer get what it holds."""
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is CALL or frame.f_code.co_name == "forward":
            return True
        frame = frame.f_back
    return False


def _inside(layer: nn.Module, anchor: Anchor) -> bool:
    return anchor.traced if torch.compiler.is_compiling() else _values.running is layer


def _read(layer: nn.Module, anchor: Anchor, key: str, value: Tensor) -> Tensor:
    """`value` of the layer's weight or bias with the changes of its active adapters, computed when it is needed."""
    selection, table, kind = anchor.selector.current(), slot_table(layer, LAYER), anchor.kind
    found = [(active, table[active.name]) for active in selection.active if active.name in table]
    if not found or kind is None or value.is_meta or "_hf_hook" in layer.__dict__:
        return value
    if type(value) not in (Tensor, nn.Parameter) and bridge_of(value) is not None:
        return value  # codes, which nobody but their library can read
    base, of = Base(kind, layer, selection.context), _shift if key == "bias" else _matrix

    def summed() -> Tensor:
        total = kind.weight(layer) if isinstance(value, Packed) else value
        for active, adapter in found:
            change = of(anchor, adapter, base)
            if change is not None:
                _read_past(anchor, active)
                total = total + (change if active.weight == 1 else active.weight * change).to(total.dtype)
        return total

    if not torch.compiler.is_compiling():
        return Read(value, summed)
    # compiled code cannot wait: what may be a mere look at a dtype is no place to refuse anything
    follow = all(active.name not in anchor.moving and not _by_row(active) for active, _ in found)
    return summed() if follow else value


def _read_past(anchor: Anchor, active: Active) -> None:
    """A change takes part in a weight that is read without calling its layer."""
    anchor.outside.add(LAYER)
    if anchor.selector.reached is not None:
        anchor.selector.reached.add(anchor.name)
    _same_for_all_rows(f"{anchor.name!r} is read without being called, and", active)


def _matrix(anchor: Anchor, adapter: Adapter, base: Base) -> Tensor:
    """ΔW in the layout of the layer's own weight."""
    if adapter.training and adapter.dropout:
        warnings.warn(
            f"layer {anchor.name!r} is read without being called: the dropout of its adapter does not act there",
            stacklevel=2,
        )
    return base.kind.to_weight(base.layer, _fixed(anchor, lambda: adapter.delta(base)))


def _shift(anchor: Anchor, adapter: Adapter, base: Base) -> Tensor | None:
    """Δb."""
    return _fixed(anchor, lambda: adapter.delta_bias(base))


def _fixed(anchor: Anchor, change: Callable[[], T]) -> T:
    try:
        return change()
    except NotMergeable as error:
        raise StateError(
            f"layer {anchor.name!r} is read without being called, and {error}: leave it out by "
            f"exclude_modules=[{anchor.name!r}], or choose a method with a fixed matrix for it"
        ) from error


def unseen_by_calls(layer: nn.Module, slot: str) -> bool:
    """Whether a parameter has only ever been read past the calls of its layer, or a layer's weight ever was; False
    where nothing is known yet.
    """
    anchor: Anchor | None = layer.__dict__.get("_rankloom")
    return anchor is not None and slot in anchor.outside and slot not in anchor.inside


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
            _same_for_all_rows(f"{name!r}", active)
            if hooked:
                bring_home(adapter)
            out = adapter.add(out, None, value, base, active.weight)
    if scope is not None:
        scope[key, grad] = out
    return out


def _by_row(active: Active) -> bool:
    return active.rows is not None or (isinstance(active.weight, Tensor) and bool(active.weight.ndim))


def _same_for_all_rows(name: str, active: Active) -> None:
    if _by_row(active):
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
