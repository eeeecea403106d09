"""Grafting: a layer's class is swapped for a generated subclass, so names, types and state-dict keys stay.

A layer slot changes what the layer's `forward` returns. A parameter slot is a property on the generated class, so any
code that reads the parameter hears the change, and the parameter itself stays where it was.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.fuse import Memo, answer
from rankloom.core.kinds import Bare, Base, Kind, repairs_of
from rankloom.core.mixed import Stacks, in_segments
from rankloom.core.switch import Switch, Voice, Voices, Weight
from rankloom.errors import StateError, TargetError
from rankloom.ops.autocast import autocasts

LAYER = "layer"
"""Slot of a change to the layer's output; every other slot but `SHARED` is a parameter's name."""
SHARED = "shared"
"""Slot on an adapter's first layer where the tensors that its sites share are registered."""


class Anchor:
    """What a grafted layer knows of its bank: the switch, its own name, its kind (None: only parameter slots); and what
    it has learnt while running.
    """

    def __init__(self, switch: Switch, name: str) -> None:
        self.switch = switch
        self.name = name
        self.kind: Kind | None = None
        self.stacks = Stacks()
        self.memo = Memo()


class _Values(threading.local):
    """Effective parameters already computed inside the running forward of their owner, by owner id."""

    def __init__(self) -> None:
        self.scopes: dict[int, dict[tuple[str, bool], Tensor]] = {}


_values = _Values()


class Grafted(nn.Module):
    """Mixin in front of the original class in every generated class."""

    rankloom_original: type[nn.Module]
    rankloom_parameters: tuple[str, ...]
    _rankloom: Anchor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            fused = _fused(self, args[0])
            if fused is not None:
                return fused
        if self.rankloom_parameters and not torch.compiler.is_compiling():
            outer = _values.scopes.get(id(self))
            _values.scopes[id(self)] = {}
            try:
                y = super().forward(*args, **kwargs)
            finally:
                if outer is None:
                    del _values.scopes[id(self)]
                else:
                    _values.scopes[id(self)] = outer
        else:
            y = super().forward(*args, **kwargs)
        anchor = self._rankloom
        if anchor.kind is None:
            return y
        if anchor.switch.heard is not None:
            anchor.switch.heard.add(anchor.name)
        voices = anchor.switch.voices()
        if not voices.speakers:
            return y
        x = args[0] if args else next(iter(kwargs.values()))
        return _speak(self, anchor.kind, x, y, voices)

    def __reduce_ex__(self, protocol: Any) -> Any:
        speaks = self._rankloom.kind is not None
        return _rebuild, (self.rankloom_original, self.rankloom_parameters, speaks), self.__getstate__()  # type: ignore[no-untyped-call]


def _rebuild(original: type[nn.Module], parameters: tuple[str, ...], speaks: bool) -> nn.Module:
    cls = _generated(original, parameters, speaks)
    return cls.__new__(cls)


def _fused(layer: Grafted, x: Any) -> Tensor | None:
    """The output by the fused path, where the layer fits it and one adapter speaks."""
    anchor = layer._rankloom
    voices = anchor.switch.voices()
    if anchor.kind is None or not voices.speakers:
        return None
    if anchor.switch.heard is not None:
        anchor.switch.heard.add(anchor.name)
    return answer(layer, x, voices, _only_speaker)


def _only_speaker(layer: nn.Module, voices: Voices) -> tuple[Voice, Adapter] | str:
    table = slot_table(layer, LAYER)
    found = [(voice, table[voice.name]) for voice in voices.speakers if voice.name in table]
    return found[0] if len(found) == 1 else f"{len(found)} adapters speak"


def _speak(layer: nn.Module, kind: Kind, x: Any, y: Tensor, voices: Voices) -> Tensor:
    """The base output with every speaking adapter's change added; each sees the *base* output."""
    table = slot_table(layer, LAYER)
    base = Base(kind, layer, voices.context)
    hooked = "_hf_hook" in layer.__dict__
    out, speakers = y, voices.speakers
    if voices.segments is not None and kind.linear and not hooked and _plain(y):
        _times(layer, y, voices.batch)
        out, speakers = in_segments(table, x, y, base, voices, layer.__dict__["_rankloom"].stacks)
    for voice in speakers:
        adapter = table.get(voice.name)
        if adapter is None:
            continue
        if hooked:
            bring_home(adapter)
        if voice.rows is None:
            out = adapter.add(out, x, y, base, _by_row(layer, y, voice.weight))
        else:
            rows = _expand(layer, y, voice.rows, voices.batch)
            said = adapter.add(out[rows], x[rows], y[rows], base, voice.weight)
            out = out.index_copy(0, rows, said.to(out.dtype))
    return out


def _by_row(layer: nn.Module, y: Tensor, weight: Weight) -> Weight:
    """The weight in the rows (and tokens) of `y`: a number, or a tensor of no, one or two dims."""
    if not isinstance(weight, Tensor) or not weight.ndim:
        return weight
    if weight.shape[0] != y.shape[0]:
        weight = weight.repeat_interleave(_fold(layer, y, weight.shape[0]), dim=0)
    if weight.ndim > 2 or (weight.ndim == 2 and (y.ndim < 3 or weight.shape[1] != y.shape[1])):
        raise StateError(
            f"weights of shape {tuple(weight.shape)}: layer {_name(layer)!r} gives {tuple(y.shape)}; "
            "a weight has the shape (), (batch,) or (batch, tokens) of this very pass"
        )
    return weight


def _name(layer: nn.Module) -> str:
    anchor: Anchor = layer.__dict__["_rankloom"]
    return anchor.name


def _fold(layer: nn.Module, y: Tensor, batch: int) -> int:
    """How many leading entries of `y` belong to one batch row (beams; flattened tokens only where it is certain)."""
    times, left = divmod(y.shape[0], batch)
    if left or y.ndim < 3:
        raise StateError(
            f"per-row adapters: layer {_name(layer)!r} sees {y.shape[0]} rows, the selection has {batch}; "
            "this layer does not keep batch rows apart (flattened or routed tokens): select one adapter for all rows"
        )
    return times


def _times(layer: nn.Module, y: Tensor, batch: int | None) -> int:
    return 1 if batch is None or batch == y.shape[0] else _fold(layer, y, batch)


def _expand(layer: nn.Module, y: Tensor, rows: Tensor, batch: int | None) -> Tensor:
    rows, times = rows.to(y.device), _times(layer, y, batch)
    return rows if times == 1 else (rows[:, None] * times + torch.arange(times, device=y.device)).flatten()


def _plain(y: Tensor) -> bool:
    """True where nothing traces or recasts what runs now."""
    return not (torch.compiler.is_compiling() or autocasts(y))


def _effective(owner: Grafted, key: str) -> Tensor | None:
    """The parameter `key` of `owner` with the change of every speaking adapter."""
    value: Tensor | None = owner._parameters.get(key)
    value = owner._buffers.get(key) if value is None else value
    anchor = owner._rankloom
    if value is None:
        return None
    if anchor.switch.heard is not None:
        anchor.switch.heard.add(f"{anchor.name}.{key}" if anchor.name else key)
    voices = anchor.switch.voices()
    table = slot_table(owner, key)
    if not any(voice.name in table for voice in voices.speakers):
        return value
    scope = None if torch.compiler.is_compiling() else _values.scopes.get(id(owner))
    hooked = "_hf_hook" in owner.__dict__
    if value.is_meta or (hooked and scope is None):
        return value  # there is nothing to compute with; or accelerate moves the parameter itself
    grad = torch.is_grad_enabled()
    if scope is not None and (key, grad) in scope:
        return scope[key, grad]
    base = Base(Bare(key), owner, voices.context)
    out: Tensor = value
    for voice in voices.speakers:
        adapter = table.get(voice.name)
        if adapter is not None:
            _same_for_all_rows(anchor, key, voice)
            if hooked:
                bring_home(adapter)
            out = adapter.add(out, None, value, base, voice.weight)
    if scope is not None:
        scope[key, grad] = out
    return out


def _same_for_all_rows(anchor: Anchor, key: str, voice: Voice) -> None:
    if voice.rows is not None or (isinstance(voice.weight, Tensor) and voice.weight.ndim):
        raise StateError(
            f"per-row adapters: {anchor.name}.{key} is a bare parameter, the same for all rows; "
            f"adapter {voice.name!r} can speak there only for the whole batch"
        )


def slot_table(layer: nn.Module, slot: str) -> dict[str, Adapter]:
    """Adapters of `layer` at `slot`, by adapter name."""
    slots = layer._modules.get("adapters")
    table = None if slots is None else slots._modules.get(slot)
    return {} if table is None else table._modules  # type: ignore[return-value]


_classes: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[Grafted]] = {}


def _generated(original: type[nn.Module], parameters: tuple[str, ...], speaks: bool) -> type[Grafted]:
    key = (original, parameters, speaks)
    if key not in _classes:
        body: dict[str, Any] = {
            "__module__": original.__module__,
            "rankloom_original": original,
            "rankloom_parameters": parameters,
        }
        for name in parameters:
            body[name] = _parameter_property(name)
        _classes[key] = type(f"Grafted{original.__name__}", (Grafted, *repairs_of(original), original), body)
    return _classes[key]


def _parameter_property(name: str) -> property:
    def read(self: Grafted) -> Tensor | None:
        return _effective(self, name)

    return property(read)


def plant(layer: nn.Module, slot: str, name: str, adapter: Adapter, switch: Switch, path: str, kind: Kind) -> None:
    """Put `adapter` into `slot` of `layer` under the adapter `name`, grafting the layer if it is not yet.

    Raises before the layer is touched.
    """
    _check_graftable(layer, path)
    if not isinstance(layer, Grafted):
        layer.__dict__["_rankloom"] = Anchor(switch, path)
        layer.add_module("adapters", nn.ModuleDict())
    anchor: Anchor = layer.__dict__["_rankloom"]
    if slot == LAYER:
        anchor.kind = kind
        kind.settle(layer)
    slots: nn.ModuleDict = layer._modules["adapters"]  # type: ignore[assignment]
    if slot not in slots:
        slots[slot] = nn.ModuleDict()
    slots[slot].add_module(name, adapter)
    _set_class(layer)


def uproot(layer: nn.Module, slot: str, name: str) -> None:
    """Take the adapter out; the last one gives the layer its own class back."""
    slots: nn.ModuleDict = layer._modules["adapters"]  # type: ignore[assignment]
    layer.__dict__["_rankloom"].stacks = Stacks()
    _drop(slots, slot, name)
    anchor: Anchor = layer.__dict__["_rankloom"]
    if slot == LAYER and LAYER not in slots and anchor.kind is not None:
        anchor.kind.release(layer)
        anchor.kind = None
    if not any(name in slot_table(layer, s) for s in slots._modules if s != SHARED):
        _drop(slots, SHARED, name)
    if len(slots):
        _set_class(layer)
        return
    del layer._modules["adapters"]
    original = type(layer).rankloom_original  # type: ignore[attr-defined]
    _rebind_instance_forward(layer, original)
    layer.__class__ = original
    del layer.__dict__["_rankloom"]


def own(layer: nn.Module, name: str, shared: nn.Module) -> None:
    """Register the shared tensors of the adapter `name` on its first layer."""
    slots: nn.ModuleDict = layer._modules["adapters"]  # type: ignore[assignment]
    if SHARED not in slots:
        slots[SHARED] = nn.ModuleDict()
    slots[SHARED].add_module(name, shared)


def _drop(slots: nn.ModuleDict, slot: str, name: str) -> None:
    table = slots._modules.get(slot)
    if table is None:
        return
    table._modules.pop(name, None)
    if not table._modules:
        del slots[slot]


def _check_graftable(layer: nn.Module, path: str) -> None:
    kind = type(layer)
    if isinstance(layer, Grafted):
        _check_class(layer)
    elif "adapters" in layer._modules or "adapters" in layer.__dict__ or hasattr(kind, "adapters"):
        raise TargetError(f"layer {path!r} ({kind.__name__}) already has an attribute 'adapters'")
    check_forward(layer, path)


def check_forward(layer: nn.Module, path: str) -> None:
    """Refuse a layer with a `forward` of its own, unless accelerate put it there: it would call past the adapters."""
    own_forward = layer.__dict__.get("forward")
    if own_forward is None or "_hf_hook" in layer.__dict__:
        return
    if getattr(own_forward, "__func__", None) is not type(layer).forward:
        raise TargetError(
            f"layer {path!r} ({type(layer).__name__}) carries its own forward ({own_forward!r}), which would hide the "
            "adapter: take that forward off before adapters are attached or detached"
        )


def _check_class(layer: Grafted) -> None:
    if "rankloom_original" not in vars(type(layer)):
        raise StateError(
            f"layer {layer._rankloom.name!r} was wrapped into {type(layer).__name__} after grafting; "
            "attach and detach adapters before sharding the model"
        )


def _set_class(layer: nn.Module) -> None:
    if isinstance(layer, Grafted):
        _check_class(layer)
    original = type(layer).rankloom_original if isinstance(layer, Grafted) else type(layer)
    slots = layer._modules["adapters"]
    assert slots is not None
    parameters = tuple(sorted(s for s in slots._modules if s not in (LAYER, SHARED)))
    cls = _generated(original, parameters, LAYER in slots._modules)
    _rebind_instance_forward(layer, cls)
    layer.__class__ = cls


def recast(layer: nn.Module, original: type[nn.Module]) -> None:
    """Give a grafted layer another class below its adapters."""
    slots = layer._modules["adapters"]
    cls = _generated(original, type(layer).rankloom_parameters, slots is not None and LAYER in slots._modules)  # type: ignore[attr-defined]
    _rebind_instance_forward(layer, cls)
    layer.__class__ = cls


def _rebind_instance_forward(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Keep a per-instance `forward` (accelerate's offload hooks) in front of the new class's forward."""
    if "forward" not in layer.__dict__:
        return
    bound = types.MethodType(cls.forward, layer)
    if "_hf_hook" in layer.__dict__:
        layer.__dict__["_old_forward"] = bound
    else:
        layer.__dict__["forward"] = bound


def bring_home(adapter: Adapter) -> None:
    """Keep the tensors of an adapter in memory: an offload hook of their own would give them to `forward` alone."""
    for module in [m for part in adapter.modules() for m in (part, *_lenders(part))]:
        hook = module.__dict__.get("_hf_hook")
        if getattr(hook, "offload", False):
            hook.pre_forward(module)  # type: ignore[union-attr]
            for key in ("_hf_hook", "_old_forward", "forward"):
                module.__dict__.pop(key, None)


def _lenders(part: nn.Module) -> list[nn.Module]:
    return [shared for shared, _ in part._borrowed.values()] if isinstance(part, Adapter) else []


@contextmanager
def present(layer: nn.Module) -> Iterator[None]:
    """The layer's weights in memory inside the block, also when an offload hook keeps them elsewhere."""
    hook = layer.__dict__.get("_hf_hook")
    if hook is None or not getattr(hook, "offload", False):
        yield
        return
    hook.pre_forward(layer)
    try:
        yield
    finally:
        hook.post_forward(layer, None)
