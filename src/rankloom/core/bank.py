"""The bank: the control panel of an adapted model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter, tensors_by_role
from rankloom.core.burst import burst
from rankloom.core.fingerprint import Print
from rankloom.core.fitted import Fitted
from rankloom.core.graft import bring_home, present, recast, slot_table
from rankloom.core.merging import check_in_memory, folded, holder, plain_class, plain_dtype, repacked
from rankloom.core.plan import Plan
from rankloom.core.site import Shared, Site
from rankloom.core.start import Started
from rankloom.core.switch import Switch, Voice, Voices, Weight
from rankloom.core.targets import Place
from rankloom.errors import DeafError, NotMergeable, SettingsError, StateError, suggest
from rankloom.ops.linalg import largest, largest_norm
from rankloom.ops.segments import segments
from rankloom.store.bridges import bridge_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Bank:
    """Which adapters a model has and which speak: `model.rankloom`, a plain attribute, no module of the model.

    `driven`: a training goes on that calls the rules.
    """

    model: nn.Module
    switch: Switch
    plans: dict[str, Plan]
    started: dict[str, dict[str, Started]]
    """How the start of a plan came out, by adapter and site."""
    handed: Print | None
    """Fingerprint of the base before a plan's store packed it; None: it is as it was handed in."""
    driven: bool

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.switch = Switch()
        self.plans = {}
        self.started = {}
        self.handed: Print | None = None
        self.driven = False
        self._fitted: dict[str, list[tuple[Place, Site]]] = {}
        self._shared: dict[str, Shared] = {}
        self._undo: dict[str, list[Callable[[], None]]] = {}
        self._requires_grad: dict[str, bool] = {}
        self._merged: dict[str, float] = {}
        self._originals: list[tuple[nn.Module, str, Tensor | None]] = []
        self._recast: list[tuple[nn.Module, type[nn.Module]]] = []

    def __repr__(self) -> str:
        return f"Bank(adapters={list(self.plans)}, active={list(self.active)}, merged={list(self._merged)})"

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters in the bank."""
        return tuple(self.plans)

    @property
    def active(self) -> dict[str, Weight]:
        """Adapters that speak here and now, with their weights."""
        return {voice.name: voice.weight for voice in self.switch.voices().speakers}

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters that are merged into the base at present."""
        return tuple(self._merged)

    def use(self, *names: str, rows: Sequence[str | None] | Tensor | None = None, **weights: Weight) -> None:
        """Set who speaks by default, for every thread: `use("a")`, `use(a=0.7, b=0.3)`, `use()` for the bare base.

        A weight is a number, a 0-d tensor, or a tensor (batch,) or (batch, tokens). `rows` picks one adapter for each
        batch row: a list of names (None: bare base), or an int tensor (batch,) of indices into `names` (−1: base).
        """
        self._not_merged("use")
        self.switch.default = self._voices(names, weights, rows, {})

    @contextmanager
    def using(
        self,
        *names: str,
        rows: Sequence[str | None] | Tensor | None = None,
        context: Mapping[str, Any] | None = None,
        **weights: Weight,
    ) -> Iterator[Bank]:
        """Like `use`, inside the block and in this thread or task only; `using()` is bitwise the base.

        `context`: what gates may know of the batch. With gradient checkpointing keep the backward inside the block.
        Compiled models read the selection of the thread.
        """
        self._not_merged("using")
        with self.switch.local(self._voices(names, weights, rows, dict(context or {}))):
            yield self

    def adapters(self, name: str | None = None, of: type[Adapter] | None = None) -> Iterator[tuple[str, Adapter]]:
        """(site name, adapter) of the adapter `name` (or of all), optionally of one class, inside combinators too."""
        for each in [name] if name is not None else self.names:
            for fitted in self.fitted(each):
                if of is None:
                    yield fitted.site.name, fitted.adapter
                else:
                    yield from ((fitted.site.name, m) for m in fitted.adapter.modules() if isinstance(m, of))

    def fitted(self, name: str) -> list[Fitted]:
        """Every adapter of `name` in its place."""
        self._known(name)
        found = [Fitted(p, s, slot_table(p.layer, p.slot)[name]) for p, s in self._fitted[name]]
        for each in found:
            if "_hf_hook" in each.place.layer.__dict__:
                bring_home(each.adapter)
        return found

    def tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter, str]]:
        """(key, parameter, role) of all that belongs to `name`: "site:path" for owned, "shared:key" for shared."""
        for fitted in self.fitted(name):
            for path, parameter, role in tensors_by_role(fitted.adapter):
                yield f"{fitted.site.name}:{path}", parameter, role
        shared = self.shared_of(name)
        for key, parameter in shared.named_parameters():
            yield f"shared:{key}", parameter, shared.roles[key]

    def shared_of(self, name: str) -> Shared:
        """The tensors that the adapters of `name` share."""
        self._known(name)
        return self._shared[name]

    def trainable(self, *names: str) -> Iterator[tuple[str, nn.Parameter, str]]:
        """`tensors` of the named adapters (default: the active ones) that are trained."""
        for name in names or self.active:
            for key, parameter, role in self.tensors(name):
                if parameter.requires_grad:
                    yield f"{name}/{key}", parameter, role

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Fill the adapter afresh, so that its change is zero for the present base."""
        for fitted in self.fitted(name):
            if not any(p.is_meta for p in fitted.adapter.parameters()):
                with present(fitted.place.layer):
                    fitted.adapter.reset(fitted.base)

    @torch.no_grad()
    def fold(self, *names: str, sign: float = 1.0, **weights: float) -> None:
        """Add the changes to the base for good (`sign=-1` subtracts); the adapters stay as they are.

        All changes are computed before any is written. Raises `NotMergeable` before touching anything.
        """
        self._not_merged("fold")
        self._write({n: sign * w for n, w in self._numbers(names, weights).items()}, keep=False)

    @torch.no_grad()
    def merge(self, *names: str, into: Literal["dense", "store"] = "dense", **weights: float) -> dict[str, float]:
        """Put the changes of the named adapters (default: the active ones) into the base until `unmerge`.

        The old tensors are kept, so `unmerge` is exact. Weights tied to others come apart while merged. `into="store"`
        keeps packed weights packed: without loss where the adapter can, else rounded again. Returns, for each packed
        weight, the part of the change that was lost, |W' − (W + ΔW)| / |ΔW|.
        """
        self._not_merged("merge")
        chosen = self._numbers(names, weights) if names or weights else self._active_numbers()
        lost = self._write(chosen, keep=True, into=into)
        self._merged = chosen
        self.switch.muted = True
        return lost

    def unmerge(self) -> None:
        """Put the tensors back that `merge` replaced: the very same ones."""
        if not self._merged:
            raise StateError("nothing is merged")
        for layer, key, tensor in reversed(self._originals):
            held = holder(layer, key)
            held[key] = _beside(tensor, held[key])
        for layer, original in self._recast:
            recast(layer, original)
        _settle([layer for layer, _, _ in self._originals])
        self._originals, self._recast, self._merged = [], [], {}
        self.switch.muted = False

    def delta(self, name: str) -> dict[str, Tensor]:
        """ΔW (…, out, in) of every site of `name`. Raises `NotMergeable` where there is none."""
        with torch.no_grad():
            return {f.site.name: f.adapter.delta(f.base) for f in self.fitted(name)}

    @torch.no_grad()
    def probe(self, *args: Any, **batch: Any) -> tuple[str, ...]:
        """Run the model once in eval mode on a batch; the sites that were never heard, in order."""
        training = [(module, module.training) for module in self.model.modules()]
        self.switch.heard = set()
        self.model.eval()
        try:
            self.model(*args, **batch)
            heard = self.switch.heard
        finally:
            self.switch.heard = None
            for module, flag in training:
                module.training = flag
        sites = dict.fromkeys(p.name for pairs in self._fitted.values() for p, s in pairs if not s.buffer)
        return tuple(name for name in sites if name not in heard)

    def require_heard(self, *args: Any, **batch: Any) -> None:
        """`probe`, refusing unheard sites."""
        deaf = self.probe(*args, **batch)
        if deaf:
            shown = ", ".join(map(repr, deaf[:5])) + (f" and {len(deaf) - 5} more" if len(deaf) > 5 else "")
            raise DeafError(
                f"never heard on the probe batch: {shown}. The model reads these weights without calling the layer; "
                "adapt the weight itself: target_parameters=['<layer>.weight']"
            )

    def _voices(
        self,
        names: Sequence[str],
        weights: Mapping[str, Weight],
        rows: Sequence[str | None] | Tensor | None,
        context: Mapping[str, Any],
    ) -> Voices:
        if rows is not None:
            if weights:
                raise SettingsError("rows and weights together: give the weights as (batch,) tensors instead of rows")
            return self._by_row(names, rows, context)
        speakers = {name: Voice(name) for name in names} | {name: Voice(name, w) for name, w in weights.items()}
        for name, voice in speakers.items():
            self._known(name)
            if isinstance(voice.weight, bool) or not isinstance(voice.weight, (int, float, Tensor)):
                raise SettingsError(f"{name}={voice.weight!r}: a weight is a number or a tensor, as in use({name}=0.5)")
        return Voices(tuple(speakers.values()), context=context)

    def _by_row(self, names: Sequence[str], rows: Sequence[str | None] | Tensor, context: Mapping[str, Any]) -> Voices:
        if isinstance(rows, Tensor):
            order = tuple(names) or self.names
            for name in order:
                self._known(name)
            speakers = [Voice(name, (rows == i).float()) for i, name in enumerate(order)]
            return Voices(tuple(speakers), context=context)
        if names:
            raise SettingsError("rows as a list already names the adapters")
        wanted = dict.fromkeys(name for name in rows if name is not None)
        for name in wanted:
            self._known(name)
        if not wanted:
            return Voices(batch=len(rows), context=context)
        number = {name: i for i, name in enumerate(wanted)}
        sorted_ = segments([-1 if row is None else number[row] for row in rows])
        spoken = tuple(
            Voice(n, 1.0, torch.tensor([i for i, w in enumerate(sorted_.which) if w == number[n]])) for n in wanted
        )
        return Voices(spoken, batch=len(rows), context=context, segments=sorted_)

    def _numbers(self, names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
        chosen = dict.fromkeys(names, 1.0) | dict(weights)
        if not chosen:
            raise SettingsError(f"name the adapters; there is {', '.join(self.names)}")
        for name in chosen:
            self._known(name)
        return chosen

    def _active_numbers(self) -> dict[str, float]:
        voices = self.switch.voices().speakers
        if not voices:
            raise StateError("no adapter is active: name the adapters to merge")
        for voice in voices:
            if voice.rows is not None or (isinstance(voice.weight, Tensor) and voice.weight.ndim):
                raise NotMergeable(f"adapter {voice.name!r} speaks row by row: there is no single matrix to merge")
        return {voice.name: float(voice.weight) for voice in voices}

    @burst()
    def _write(
        self, weights: Mapping[str, float], keep: bool, into: Literal["dense", "store"] = "dense"
    ) -> dict[str, float]:
        by_layer: dict[int, list[tuple[Fitted, float]]] = {}
        for name, weight in weights.items():
            everything = self.fitted(name)
            self._finite(name, everything)
            for fitted in everything:
                by_layer.setdefault(id(fitted.place.layer), []).append((fitted, weight))
        for parts in by_layer.values():
            check_in_memory(parts[0][0].place)
        _settle([parts[0][0].place.layer for parts in by_layer.values()])
        dtype = plain_dtype(self.model)
        new = [entry for parts in by_layer.values() for entry in folded(parts, dtype)]
        lost: dict[str, float] = {}
        if into == "store":
            packed = [
                (parts, entry) for parts in by_layer.values() for entry in new if entry[0] is parts[0][0].place.layer
            ]
            new = [repacked(parts, entry, lost) for parts, entry in packed]
        for layer, key, value in new:
            held = holder(layer, key)
            if keep:
                self._originals.append((layer, key, held[key]))
            as_it_is = held is layer._buffers or isinstance(value, nn.Parameter)
            held[key] = value if as_it_is else nn.Parameter(value, requires_grad=False)
            original = plain_class(layer, key)
            if original is not None:
                if keep:
                    self._recast.append((layer, type(layer).rankloom_original))  # type: ignore[attr-defined]
                recast(layer, original)
        _settle([layer for layer, _, _ in new])
        return lost

    def _finite(self, name: str, everything: Sequence[Fitted]) -> None:
        roots = (*(fitted.adapter for fitted in everything), self._shared[name])
        tables = (module._parameters for root in roots for module in root.modules())
        values = (p for table in tables for p in table.values() if p is not None and _has_values(p))
        if math.isfinite(largest_norm(values)):
            return
        for key, parameter, _ in self.tensors(name):
            if _has_values(parameter) and not math.isfinite(largest(parameter)):
                raise StateError(f"{key!r} of the adapter {name!r} has NaN or infinite values: nothing is merged")

    def _known(self, name: str) -> None:
        if name not in self.plans:
            raise StateError(f"no adapter {name!r} in the bank{suggest(name, self.names)}")

    def _not_merged(self, call: str) -> None:
        if self._merged:
            raise StateError(f"{call}: {', '.join(map(repr, self._merged))} is merged into the base; unmerge() first")


def _has_values(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta


def _settle(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        kind = layer.__dict__["_rankloom"].kind
        if kind is not None:
            kind.settle(layer)


def _beside(tensor: Tensor | None, here: Tensor | None) -> Tensor | None:
    """A kept tensor where, and in the dtype in which, the one that takes its place for now has come to be."""
    if tensor is None or here is None or (here.device, here.dtype) == (tensor.device, tensor.dtype):
        return tensor
    if bridge_of(tensor) is not None:
        return tensor if here.device == tensor.device else tensor.to(here.device)
    tensor.data = tensor.data.to(here.device, here.dtype)
    return tensor
