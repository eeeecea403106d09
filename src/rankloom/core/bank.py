"""The bank: the control panel of an adapted model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter, adapts, tensors_by_role
from rankloom.core.burst import burst
from rankloom.core.choosing import Rows, choose, time_first
from rankloom.core.fingerprint import Print, fingerprint
from rankloom.core.journal import Edit, Fold, Into, Journal
from rankloom.core.lock import Lock
from rankloom.core.merging import check_fits, check_in_memory, edited, edits, kind_at, plain_dtype, repacked
from rankloom.core.moments import Forget, forget
from rankloom.core.plan import Plan
from rankloom.core.replaced import Replaced, normalise
from rankloom.core.selection import Selection, Selector, Weight
from rankloom.core.shared import Shared
from rankloom.core.site import Site
from rankloom.core.slots import bring_home, present
from rankloom.core.start import Started
from rankloom.core.state import held, put
from rankloom.core.targets import has_at
from rankloom.errors import NotMergeable, SettingsError, StateError, UnreachedError, suggest
from rankloom.ops.linalg import largest, largest_norm

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class Bank:
    """The adapters of a model and which of them are active or trained: `model.rankloom`, a plain attribute, no module.

    `driven`: a training goes on that calls the rules. `lock`: held by `fit` while a step changes tensors, and by `save`
    while it copies them, so that what is saved is of one step; hold it around the steps of a loop of your own.
    """

    model: nn.Module
    selector: Selector
    plans: dict[str, Plan]
    started: dict[str, dict[str, Started]]
    """How the start of a plan came out, by adapter and site."""
    handed: Print | None
    """Fingerprint of the base before a plan's store packed it; None: it is as it was handed in."""
    journal: Journal
    """What was folded into the base."""
    driven: bool
    lock: Lock

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.selector = Selector()
        self.plans = {}
        self.started = {}
        self.handed: Print | None = None
        self.driven = False
        self.journal = Journal()
        self.lock = Lock()
        self._sites: dict[str, list[Site]] = {}
        self._shared: dict[str, Shared] = {}
        self._undo: dict[str, list[Callable[[], None]]] = {}
        self._requires_grad: dict[str, bool] = {}
        self._trained: frozenset[str] | None = None
        self._time_first: tuple[tuple[str, ...], str] = ((), "")
        self._merged: dict[str, float] = {}
        self._merged_how: dict[str, Any] = {}
        self._replaced = Replaced()
        self._unfolded: tuple[Journal, Replaced] | None = None

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
        """The active adapters that a training moves: those named by `train`, else all; without the frozen ones."""
        chosen = (n for n in self.active if self._trained is None or n in self._trained)
        return tuple(n for n in chosen if any(p.requires_grad for _, p, _ in self.tensors(n)))

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
        """Every site of the adapter `name`, with the adapter there. Raises `StateError` where the model has another
        module in the place of its layer by now.
        """
        self._known(name)
        gone = [site for site in self._sites[name] if not has_at(self.model, site.path, site.layer)]
        if gone:
            there = set(map(id, self.model.modules()))  # a wrapper may have changed its path
            lost = next((site.name for site in gone if id(site.layer) not in there), None)
            if lost is not None:
                raise StateError(
                    f"layer {lost!r} was replaced after adapter {name!r} was attached, which has no effect there any "
                    "more: change the model first, then attach or load"
                )
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

    def state(self, name: str, *, copy: bool = True) -> dict[str, Tensor]:
        """Every tensor of the adapter `name` by key, as in `tensors`, with frozen ones and kept buffers; `copy=False`
        gives the tensors themselves. In PEFT's keys: `rankloom.formats.state`.
        """
        found = held(self, name)
        return {key: t.detach().clone() for key, t in found.items()} if copy else found

    def load_state(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write what `state` gave into the adapter `name`, in its own dtypes.

        Raises `StateError` before anything is written for missing and unknown keys and for shapes that it cannot take.
        """
        put(self, name, tensors)

    def adapted(self, name: str) -> tuple[str, ...]:
        """Names of the sites whose matrices the adapter changes, without tensors that are trained whole."""
        return tuple(site.name for site in self.sites(name) if adapts(site.adapter))

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
        into: Into = "store",
        sign: float = 1.0,
        context: Mapping[str, Any] | None = None,
        **weights: float,
    ) -> dict[str, float]:
        """Add the changes to the base for good (`sign=-1` subtracts) and note them in the journal; the adapters stay as
        they are.

        All changes are computed before any is written. A packed weight stays packed, rounded anew unless the adapter's
        change fits its store; `into="dense"` unpacks it. `context` and what is returned: as in `merge`. Raises
        `NotMergeable` before touching anything.
        """
        self._not_merged("fold")
        numbers = {n: sign * w for n, w in self._numbers(names, weights).items()}
        return self._record(self._fold(numbers, into, context=context).kept())

    @torch.no_grad()
    def restart(
        self,
        name: str,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        moments: Forget | None = None,
        into: Into = "store",
    ) -> dict[str, float]:
        """Fold the adapter, fill it afresh from torch's random numbers, and let `optimizer` forget the tensors that
        start anew (`moments`: by default all that it knows of them).

        The model's outputs stay as they are, but for rounding; those of packed weights by what `fold` returns. Tensors
        that are trained whole (modules_to_save, biases, token rows) go on as they are, and so does their state.
        """
        self._not_merged("restart")
        moved = [site for site in self.sites(name) if adapts(site.adapter)]
        kept = {site.name for site in moved}
        lost = self._record(self._fold({name: 1.0}, into, lambda site: site.name in kept).kept())
        for site in moved:
            site.adapter.reset(site.base)
        if optimizer is not None:
            anew = {p: None for _, p, role in self.tensors(name) if role != "whole"}
            forget(optimizer, anew, moments or Forget())
        return lost

    def original(self) -> Print:
        """Fingerprint of the base before the first fold."""
        return self.journal.base or fingerprint(self.model)

    @torch.no_grad()
    def refold(self, journal: Journal) -> None:
        """Bring the base to where `journal` left one like it: fold what it has beyond this bank's own journal.

        Raises `StateError` where this base has other folds, unless they can be taken back (`keep_originals`), and
        `TargetError` for a site that the model has not; nothing is written then.
        """
        self._not_merged("refold")
        if not journal.continues(self.journal):
            before = None if self._unfolded is None else self._unfolded[0]
            if before is None or not journal.continues(before):
                raise StateError(
                    f"the base has {len(self.journal)} folds of its own, which are not the first of these "
                    f"{len(journal)}: load the base anew"
                )
            self.unfold()
        check_fits(self.model, journal.rows(), {key: tensor.shape for key, tensor in journal.tensors().items()})
        for fold in journal.folds[len(self.journal) :]:
            self._record(fold)

    def keep_originals(self) -> None:
        """Keep the tensors that folds replace from now on, for `unfold`: memory for each of them twice."""
        self._unfolded = (self.journal, Replaced())

    def forget_originals(self) -> None:
        """Let go of what `keep_originals` kept."""
        self._unfolded = None

    def unfold(self) -> None:
        """Take back what was folded since `keep_originals`, exactly: the very same tensors are in place again."""
        self._not_merged("unfold")
        if self._unfolded is None:
            raise StateError(
                "unfold: the tensors from before the folds were not kept; call keep_originals() before folding, or "
                "load the base anew (fold(…, sign=-1) subtracts, which rounds)"
            )
        self.journal, replaced = self._unfolded
        replaced.put_back()

    @torch.no_grad()
    def merge(
        self, *names: str, into: Into = "dense", context: Mapping[str, Any] | None = None, **weights: float
    ) -> dict[str, float]:
        """Put the changes of the named adapters (default: the active ones) into the base until `unmerge`.

        The old tensors are kept, so `unmerge` is exact. Weights tied to others come apart while merged. `into="store"`
        keeps packed weights packed: without loss where the adapter can, else rounded again. `context`: what gates need
        to know for one matrix, such as {"task": 1}. Returns, for each packed weight, the part of the change that was
        lost, |W' − (W + ΔW)| / |ΔW|.
        """
        self._not_merged("merge")
        chosen = self._numbers(names, weights) if names or weights else self._active_numbers()
        lost = self._write(self._fold(chosen, into, context=context), self._replaced)
        self._merged, self._merged_how = chosen, {"into": into, "context": context}
        self.selector.disabled = True
        return lost

    def unmerge(self) -> None:
        """Put the tensors back that `merge` replaced: the very same ones."""
        if not self._merged:
            raise StateError("nothing is merged")
        self._replaced.put_back()
        self._merged = {}
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
                f"never reached by the probe batch: {shown}. Nothing calls these layers or reads their weights for "
                f"such a batch: leave them out (exclude_modules={list(missed[:5])!r}), or give a probe that uses them"
            )

    def _selection(
        self,
        names: Sequence[str],
        weights: Mapping[str, Weight],
        rows: Rows | None,
        context: Mapping[str, Any] | None = None,
    ) -> Selection:
        if rows is not None or any(isinstance(w, Tensor) and w.ndim for w in weights.values()):
            self._check_rows_first()
        return choose(self.names, self._known, names, weights, rows, dict(context or {}))

    def _check_rows_first(self) -> None:
        """Refuse what is chosen by row where layers see no rows in the first dim; looked at once for these adapters."""
        if self._time_first[0] != self.names:
            paths = {site.path for sites in self._sites.values() for site in sites}
            self._time_first = self.names, time_first(self.model, paths)
        if found := self._time_first[1]:
            raise StateError(
                f"per-row adapters: {found} computes with time before the batch rows, so a row is no entry of the "
                "first dim there: select one adapter for all rows"
            )

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

    def _fold(
        self,
        weights: Mapping[str, float],
        into: Into,
        chosen: Callable[[Site], bool] = bool,
        context: Mapping[str, Any] | None = None,
    ) -> Fold:
        """What folding these adapters, at the chosen sites, does to each tensor; nothing is written."""
        by_layer: dict[int, list[tuple[Site, float]]] = {}
        for name, weight in weights.items():
            everything = self._sites_in(name, context)
            self._finite(name, everything)
            for site in filter(chosen, everything):
                by_layer.setdefault(id(site.layer), []).append((site, weight))
        for parts in by_layer.values():
            check_in_memory(parts[0][0].layer, parts[0][0].name)
        normalise([parts[0][0].layer for parts in by_layer.values()])
        return Fold(tuple(edit for parts in by_layer.values() for edit in edits(parts, into)), into)

    @burst()
    def _write(self, fold: Fold, replaced: Replaced) -> dict[str, float]:
        """Write a fold; every value is computed before one is written."""
        layers = [(self.model.get_submodule(edit.path), edit) for edit in fold.edits]
        for layer, edit in layers:
            check_in_memory(layer, edit.name)
        dtype = plain_dtype(self.model)
        new: dict[tuple[int, str], tuple[nn.Module, Edit, Tensor]] = {}
        lost: dict[str, float] = {}
        for layer, edit in layers:
            key = (id(layer), kind_at(layer, edit.slot).parameter())
            now = new[key][2] if key in new else None
            new[key] = (layer, edit, edited(layer, edit, now, dtype))
        if fold.into == "store":
            for key, (layer, edit, value) in new.items():
                kept, part = repacked(layer, edit, value)
                new[key] = (layer, edit, kept)
                lost |= {} if part is None else {edit.name: part}
        for (_, key_), (layer, _, value) in new.items():
            replaced.put(layer, key_, value)
        normalise([layer for layer, _, _ in new.values()])
        return lost

    def _record(self, fold: Fold) -> dict[str, float]:
        """Write a fold for good; what is written is what the journal holds."""
        base = self.original()
        lost = self._write(fold, Replaced() if self._unfolded is None else self._unfolded[1])
        self.journal = Journal([*self.journal.folds, fold], base)
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
