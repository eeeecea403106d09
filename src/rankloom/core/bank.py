"""The bank: the control panel of an adapted model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter, tensors_by_role
from rankloom.core.burst import burst
from rankloom.core.choosing import Rows, choose
from rankloom.core.fingerprint import Print
from rankloom.core.graft import set_class
from rankloom.core.merging import check_in_memory, folded, holder, plain_class, plain_dtype, repacked
from rankloom.core.plan import Plan
from rankloom.core.selection import Selection, Selector, Weight
from rankloom.core.shared import Shared
from rankloom.core.site import Site
from rankloom.core.slots import bring_home, present
from rankloom.core.start import Started
from rankloom.errors import NotMergeable, SettingsError, StateError, UnreachedError, suggest
from rankloom.ops.linalg import largest, largest_norm
from rankloom.store.bridges import bridge_of

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Bank:
    """The adapters of a model and which of them are active or trained: `model.rankloom`, a plain attribute, no module.

    `driven`: a training goes on that calls the rules.
    """

    model: nn.Module
    selector: Selector
    plans: dict[str, Plan]
    started: dict[str, dict[str, Started]]
    """How the start of a plan came out, by adapter and site."""
    handed: Print | None
    """Fingerprint of the base before a plan's store packed it; None: it is as it was handed in."""
    driven: bool

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.selector = Selector()
        self.plans = {}
        self.started = {}
        self.handed: Print | None = None
        self.driven = False
        self._sites: dict[str, list[Site]] = {}
        self._shared: dict[str, Shared] = {}
        self._undo: dict[str, list[Callable[[], None]]] = {}
        self._requires_grad: dict[str, bool] = {}
        self._trained: frozenset[str] | None = None
        self._merged: dict[str, float] = {}
        self._originals: list[tuple[nn.Module, str, Tensor | None]] = []
        self._reclassed: list[tuple[nn.Module, type[nn.Module]]] = []

    def __repr__(self) -> str:
        return f"Bank(adapters={list(self.plans)}, active={list(self.active)}, merged={list(self._merged)})"

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters in the bank."""
        return tuple(self.plans)

    @property
    def active(self) -> dict[str, Weight]:
        """Adapters that are active here and now, with their weights."""
        return {active.name: active.weight for active in self.selector.current().active}

    @property
    def merged(self) -> tuple[str, ...]:
        """Adapters that are merged into the base at present."""
        return tuple(self._merged)

    @property
    def trained(self) -> tuple[str, ...]:
        """The active adapters that a training moves: those named by `train`, else all that are active."""
        return tuple(n for n in self.active if self._trained is None or n in self._trained)

    def train(self, *names: str) -> None:
        """Train these adapters and no other: the rest of the active ones take part and stay still, their rules rest.

        Without names every active adapter trains again. The named ones need to be active when a training begins.
        """
        for name in names:
            self._known(name)
        self._trained = frozenset(names) if names else None

    def use(self, *names: str, rows: Rows | None = None, **weights: Weight) -> None:
        """Set which adapters are active by default, for every thread: `use("a")`, `use(a=0.7, b=0.3)`, `use()` for the
        base only.

        A weight is a number, a 0-d tensor, or a tensor (batch,) or (batch, tokens). `rows` picks one adapter for each
        batch row: a list of names (None: base only), or an int tensor (batch,) of indices into `names` (−1: base only).
        """
        self._not_merged("use")
        self.selector.default = self._selection(names, weights, rows)

    @contextmanager
    def using(
        self,
        *names: str,
        rows: Rows | None = None,
        context: Mapping[str, Any] | None = None,
        **weights: Weight,
    ) -> Iterator[Bank]:
        """Like `use`, inside the block and in this thread or task only; `using()` is bitwise the base.

        In a generator the selection belongs to the generator's own steps, whoever takes them. It does not travel to an
        executor's threads, and compiled models read the selection of the thread: hand both a call of `bound`.
        `context`: what gates may know of the batch. With gradient checkpointing keep the backward inside the block.
        """
        self._not_merged("using")
        with self.selector.local(self._selection(names, weights, rows, context)):
            yield self

    def bound(
        self,
        *names: str,
        of: Callable[..., T] | None = None,
        rows: Rows | None = None,
        context: Mapping[str, Any] | None = None,
        **weights: Weight,
    ) -> Callable[..., T]:
        """A callable that carries its selection with it: `bound("a")(**batch)` is the model's answer with a active.

        `of`: what is called, the model by default; `bound("a", of=model.generate)`. Safe in any thread, task, executor
        and stream, compiled or not.
        """
        selection = self._selection(names, weights, rows, context)
        call: Callable[..., T] = self.model if of is None else of

        def answer(*args: Any, **kwargs: Any) -> T:
            self._not_merged("bound")
            with self.selector.local(selection):
                return call(*args, **kwargs)

        return answer

    def adapters(self, name: str | None = None, of: type[Adapter] | None = None) -> Iterator[tuple[str, Adapter]]:
        """(site name, adapter) of the adapter `name` (or of all), optionally of one class, inside combinators too."""
        for each in [name] if name is not None else self.names:
            for site in self.sites(each):
                if of is None:
                    yield site.name, site.adapter
                else:
                    yield from ((site.name, m) for m in site.adapter.modules() if isinstance(m, of))

    def sites(self, name: str) -> list[Site]:
        """Every site of the adapter `name`, with the adapter there."""
        self._known(name)
        for site in self._sites[name]:
            if "_hf_hook" in site.layer.__dict__:
                bring_home(site.adapter)
        return list(self._sites[name])

    def tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter, str]]:
        """(key, parameter, role) of all that belongs to `name`: "site:path" for owned, "shared:key" for shared."""
        for site in self.sites(name):
            for path, parameter, role in tensors_by_role(site.adapter):
                yield f"{site.name}:{path}", parameter, role
        shared = self.shared_of(name)
        for key, parameter in shared.named_parameters():
            yield f"shared:{key}", parameter, shared.roles[key]

    def shared_of(self, name: str) -> Shared:
        """The tensors that the adapters of `name` share."""
        self._known(name)
        return self._shared[name]

    def trainable(self, *names: str) -> Iterator[tuple[str, nn.Parameter, str]]:
        """`tensors` of the named adapters (default: `trained`) that require gradients."""
        for name in names or self.trained:
            for key, parameter, role in self.tensors(name):
                if parameter.requires_grad:
                    yield f"{name}/{key}", parameter, role

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Fill the adapter afresh, so that its change is zero for the present base."""
        for site in self.sites(name):
            if not any(p.is_meta for p in site.adapter.parameters()):
                with present(site.layer):
                    site.adapter.reset(site.base)

    @torch.no_grad()
    def fold(
        self,
        *names: str,
        into: Literal["dense", "store"] = "dense",
        sign: float = 1.0,
        context: Mapping[str, Any] | None = None,
        **weights: float,
    ) -> dict[str, float]:
        """Add the changes to the base for good (`sign=-1` subtracts); the adapters stay as they are.

        All changes are computed before any is written. `into`, `context` and what is returned: as in `merge`. Raises
        `NotMergeable` before touching anything.
        """
        self._not_merged("fold")
        signed = {n: sign * w for n, w in self._numbers(names, weights).items()}
        return self._write(signed, keep=False, into=into, context=context)

    @torch.no_grad()
    def merge(
        self,
        *names: str,
        into: Literal["dense", "store"] = "dense",
        context: Mapping[str, Any] | None = None,
        **weights: float,
    ) -> dict[str, float]:
        """Put the changes of the named adapters (default: the active ones) into the base until `unmerge`.

        The old tensors are kept, so `unmerge` is exact. Weights tied to others come apart while merged. `into="store"`
        keeps packed weights packed: without loss where the adapter can, else rounded again. `context`: what gates need
        to know for one matrix, such as {"task": 1}. Returns, for each packed weight, the part of the change that was
        lost, |W' − (W + ΔW)| / |ΔW|.
        """
        self._not_merged("merge")
        chosen = self._numbers(names, weights) if names or weights else self._active_numbers()
        lost = self._write(chosen, keep=True, into=into, context=context)
        self._merged = chosen
        self.selector.disabled = True
        return lost

    def unmerge(self) -> None:
        """Put the tensors back that `merge` replaced: the very same ones."""
        if not self._merged:
            raise StateError("nothing is merged")
        for layer, key, tensor in reversed(self._originals):
            held = holder(layer, key)
            held[key] = _beside(tensor, held[key])
        for layer, original in self._reclassed:
            set_class(layer, original)
        _normalise([layer for layer, _, _ in self._originals])
        self._originals, self._reclassed, self._merged = [], [], {}
        self.selector.disabled = False

    def delta(self, name: str, context: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """ΔW (…, out, in) of every site of `name`; `context`: as in `merge`.

        Raises `NotMergeable` where there is none.
        """
        with torch.no_grad():
            return {site.name: site.adapter.delta(site.base) for site in self._sites_in(name, context)}

    def _sites_in(self, name: str, context: Mapping[str, Any] | None) -> list[Site]:
        return [replace(site, context=context or {}) for site in self.sites(name)]

    @torch.no_grad()
    def probe(self, *args: Any, **batch: Any) -> tuple[str, ...]:
        """Run the model once in eval mode on a batch; the sites that it never reached, in order."""
        training = [(module, module.training) for module in self.model.modules()]
        self.selector.reached = set()
        self.model.eval()
        try:
            self.model(*args, **batch)
            reached = self.selector.reached
        finally:
            self.selector.reached = None
            for module, flag in training:
                module.training = flag
        names = dict.fromkeys(site.name for sites in self._sites.values() for site in sites if not site.buffer)
        return tuple(name for name in names if name not in reached)

    def require_reached(self, *args: Any, **batch: Any) -> None:
        """`probe`, refusing sites that are not reached."""
        missed = self.probe(*args, **batch)
        if missed:
            shown = ", ".join(map(repr, missed[:5])) + (f" and {len(missed) - 5} more" if len(missed) > 5 else "")
            raise UnreachedError(
                f"never reached by the probe batch: {shown}. The model reads these weights without calling the layer; "
                "adapt the weight itself: target_parameters=['<layer>.weight']"
            )

    def _selection(
        self,
        names: Sequence[str],
        weights: Mapping[str, Weight],
        rows: Rows | None,
        context: Mapping[str, Any] | None = None,
    ) -> Selection:
        return choose(self.names, self._known, names, weights, rows, dict(context or {}))

    def _numbers(self, names: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
        chosen = dict.fromkeys(names, 1.0) | dict(weights)
        if not chosen:
            raise SettingsError(f"name the adapters; there is {', '.join(self.names)}")
        for name in chosen:
            self._known(name)
        return chosen

    def _active_numbers(self) -> dict[str, float]:
        active = self.selector.current().active
        if not active:
            raise StateError("no adapter is active: name the adapters to merge")
        for one in active:
            if one.rows is not None or (isinstance(one.weight, Tensor) and one.weight.ndim):
                raise NotMergeable(f"adapter {one.name!r} is active row by row: there is no single matrix to merge")
        return {one.name: float(one.weight) for one in active}

    @burst()
    def _write(
        self,
        weights: Mapping[str, float],
        keep: bool,
        into: Literal["dense", "store"] = "dense",
        context: Mapping[str, Any] | None = None,
    ) -> dict[str, float]:
        by_layer: dict[int, list[tuple[Site, float]]] = {}
        for name, weight in weights.items():
            everything = self._sites_in(name, context)
            self._finite(name, everything)
            for site in everything:
                by_layer.setdefault(id(site.layer), []).append((site, weight))
        for parts in by_layer.values():
            check_in_memory(parts[0][0])
        _normalise([parts[0][0].layer for parts in by_layer.values()])
        dtype = plain_dtype(self.model)
        new = [entry for parts in by_layer.values() for entry in folded(parts, dtype)]
        lost: dict[str, float] = {}
        if into == "store":
            packed = [(parts, entry) for parts in by_layer.values() for entry in new if entry[0] is parts[0][0].layer]
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
                    self._reclassed.append((layer, type(layer).rankloom_original))  # type: ignore[attr-defined]
                set_class(layer, original)
        _normalise([layer for layer, _, _ in new])
        return lost

    def _finite(self, name: str, everything: Sequence[Site]) -> None:
        roots = (*(site.adapter for site in everything), self._shared[name])
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


def _normalise(layers: Sequence[nn.Module]) -> None:
    for layer in layers:
        kind = layer.__dict__["_rankloom"].kind
        if kind is not None:
            kind.normalise(layer)


def _beside(tensor: Tensor | None, here: Tensor | None) -> Tensor | None:
    """A kept tensor where, and in the dtype in which, the one that takes its place for now has come to be."""
    if tensor is None or here is None or (here.device, here.dtype) == (tensor.device, tensor.dtype):
        return tensor
    if bridge_of(tensor) is not None:
        return tensor if here.device == tensor.device else tensor.to(here.device)
    tensor.data = tensor.data.to(here.device, here.dtype)
    return tensor
