"""What is under test: a plan, models to put it on, and what the checks ask of them again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.attach import attach
from rankloom.core.bank import Bank
from rankloom.core.plan import Plan
from rankloom.core.prepare import keep_base
from rankloom.core.site import LAYER, Site
from rankloom.core.targets import base_modules
from rankloom.errors import SettingsError
from rankloom.testing.trace import equal

NUDGE = 0.2


class Unfit(SettingsError):
    """`make`, `run` or `batches` cannot carry the contract; no fault of the method."""


@dataclass(frozen=True)
class Subject:
    """`make()` gives a fresh model, always the same; `run(model, batch)` its output, batch rows in the first dim. Where
    the plan has a store, the base of the contract is the packed model.

    `steps`, `lr`: of the training that must learn; `tolerance`: largest relative difference between two computations of
    the same thing (None: 2000 units in the last place of the output's dtype, and 4 of the plan's own).
    """

    plan: Plan
    make: Callable[[], nn.Module]
    run: Callable[[nn.Module, Any], Tensor]
    batches: Sequence[Any]
    steps: int
    lr: float
    tolerance: float | None

    def model(self) -> nn.Module:
        """A fresh model in evaluation mode, as the plan's store keeps it."""
        model = self.make().eval()
        keep_base(model, self.plan)
        return model

    def adapted(self, name: str = "default", seed: int = 0) -> tuple[nn.Module, Bank]:
        """A fresh model with the adapter at its start."""
        model = self.model()
        return model, self.add(model, name, seed)

    def nudged(self, name: str = "default", seed: int = 0) -> tuple[nn.Module, Bank]:
        """A fresh model with the adapter moved away from its start."""
        model, bank = self.adapted(name, seed)
        nudge(trained(bank, name), seed)
        return model, bank

    def add(self, model: nn.Module, name: str, seed: int = 0) -> Bank:
        """Attach the plan to `model`; the same seed gives the same start."""
        torch.manual_seed(seed)
        return attach(model, self.plan, name)

    def add_nudged(self, model: nn.Module, name: str, seed: int) -> Bank:
        """Attach the plan and move the adapter away from its start."""
        bank = self.add(model, name, seed)
        nudge(trained(bank, name), seed)
        return bank

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> list[Tensor]:
        """What the model says to every batch."""
        return [self.run(model, batch).detach().clone() for batch in self.batches]

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        """What the model says to the first batch."""
        return self.run(model, self.batches[0]).detach().clone()

    def base_outputs(self) -> list[Tensor]:
        """What the frozen base says to every batch; torch's kernels may round otherwise for weights that train."""
        return self.outputs(self.model().requires_grad_(False))

    def near(self, found: Tensor, wanted: Tensor, promise: str) -> None:
        """Assert that two tensors agree within the tolerance; `promise` begins the message."""
        gap, limit = difference(found, wanted), self.limit(wanted)
        assert gap <= limit, f"{promise}: they differ by {gap:.2g} of the largest value (tolerance {limit:.2g})"

    def limit(self, like: Tensor) -> float:
        """The tolerance for tensors like this one."""
        if self.tolerance is not None:
            return self.tolerance
        own = getattr(torch, self.plan.dtype) if self.plan.dtype is not None else like.dtype
        return max(2000 * torch.finfo(like.dtype).eps, 4 * torch.finfo(own).eps)


def check_fit(subject: Subject) -> None:
    """Raise `Unfit` where the model, not the method, could fail the contract."""
    if not subject.batches:
        raise Unfit("batches is empty: the contract needs a few batches of at least two rows")
    one, two = subject.outputs(subject.model()), subject.outputs(subject.model())
    for number, (a, b, batch) in enumerate(zip(one, two, subject.batches)):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            raise Unfit(f"run(model, batches[{number}]) gives no floating-point tensor")
        if rows_of(batch) < 2 or a.shape[:1] != (rows_of(batch),):
            raise Unfit(
                f"batches[{number}] has {rows_of(batch)} rows and the output {tuple(a.shape)}: the contract compares "
                "rows, so the first dim of the batch's tensors and of the output must be the batch, of 2 rows or more"
            )
        if not torch.equal(a, b):
            raise Unfit("make() gives another model each time, or its eval mode is random: seed it inside make()")
        row = slice_of(batch, slice(0, 1))
        with torch.no_grad():
            alone = subject.run(subject.model(), row)
        if difference(alone, a[:1]) > subject.limit(a):
            raise Unfit(f"the model itself answers a row of batches[{number}] otherwise when it is alone in its batch")


def trained(bank: Bank, name: str) -> list[nn.Parameter]:
    """The tensors of an adapter that training would move."""
    return [p for _, p, _ in bank.trainable(name)]


@torch.no_grad()
def nudge(parameters: Iterable[nn.Parameter], seed: int = 0) -> None:
    """Add the same noise, of deviation 0.2, for the same seed."""
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * NUDGE
        parameter.add_(noise.to(parameter))


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors over the largest value of `b`; inf for other shapes, dtypes or NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    gap = float((a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1e-30))
    return gap if gap == gap else float("inf")


def same(found: Tensor, wanted: Tensor, promise: str) -> None:
    """Assert that two tensors are bitwise equal; `promise` begins the message."""
    assert found.shape == wanted.shape, f"{promise}: shapes {tuple(found.shape)} and {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{promise}: dtypes {found.dtype} and {wanted.dtype}"
    assert equal(found, wanted), f"{promise}: they differ by {difference(found, wanted):.2g}, and not a bit may"


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch that have rows."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_in(value)


def rows_of(batch: Any) -> int:
    """Rows of a batch: the first dim of its first tensor."""
    return next((t.shape[0] for t in tensors_in(batch)), 0)


def slice_of(batch: Any, rows: slice) -> Any:
    """The batch with some of its rows only."""
    return mapped(batch, lambda t: t[rows] if t.ndim else t)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors in `dtype`."""
    return mapped(batch, lambda t: t.to(dtype) if t.is_floating_point() else t)


def mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(mapped(value, change) for value in batch)
    return batch


@dataclass(frozen=True)
class Reached:
    """A site and the input that it got; None for a bare parameter."""

    site: Site
    x: Any

    def answer(self) -> Tensor:
        """What the site gives under the present selection: the layer's output, or the parameter as it is read."""
        site = self.site
        if site.slot == LAYER:
            answer: Tensor = site.layer(self.x)
            return answer
        value: Tensor = getattr(site.layer, site.slot)
        return value


@torch.no_grad()
def reached_sites(subject: Subject, model: nn.Module, bank: Bank, name: str) -> list[Reached]:
    """Every site of `name` with the input that the first batch brings it."""
    inputs: dict[int, Any] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(id(layer), args[0] if args else next(iter(kwargs.values())))

    sites = bank.sites(name)
    layers = {id(s.layer): s.layer for s in sites if s.slot == LAYER}
    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers.values()]
    try:
        subject.output(model)
    finally:
        for hook in hooks:
            hook.remove()
    reached = [s for s in sites if s.slot != LAYER or id(s.layer) in inputs]
    return [Reached(s, inputs.get(id(s.layer)) if s.slot == LAYER else None) for s in reached]


def has_bare_sites(bank: Bank, name: str) -> bool:
    """True where some change is of a parameter, the same for all batch rows."""
    return any(f.slot != LAYER for f in bank.sites(name))


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer of the base."""
    values = {}
    for path, module in base_modules(model):
        for key, value in {**module._parameters, **module._buffers}.items():
            if value is not None:
                values[f"{path}.{key}" if path else key] = value.detach().clone()
    return values


def assert_base_values(model: nn.Module, before: Mapping[str, Tensor], when: str) -> None:
    """Assert that the base holds the very values that it held."""
    now = base_values(model)
    for name, value in before.items():
        assert name in now, f"the base has lost {name!r} {when}"
        same(now[name], value, f"the base tensor {name!r} was changed {when}")


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode inside the block."""
    model.train()
    try:
        yield
    finally:
        model.eval()
