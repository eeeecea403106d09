"""Training: what moves, what must not, and whether it learns."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankloom.core.adapter import Adapter
from rankloom.core.attach import attach
from rankloom.core.bank import Bank
from rankloom.core.base import Base
from rankloom.core.method import Method
from rankloom.core.plan import Plan
from rankloom.core.rule import Rule, Run
from rankloom.core.site import Site
from rankloom.errors import NotMergeable, StateError
from rankloom.testing.subject import (
    Subject,
    assert_base_values,
    base_values,
    difference,
    same,
    trained,
    training,
)

GAIN = 0.7
"""A method has learnt when its loss is below this part of the frozen base's."""


class Planted(Adapter):
    """A fixed rank-one change of half the size of the matrix."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.name)
        self.register_buffer("u", torch.randn(*site.shape[:-1], 1, dtype=site.dtype, device=site.device))
        self.register_buffer("v", torch.randn(*site.shape[:-2], 1, site.in_, dtype=site.dtype, device=site.device))

    def delta(self, base: Base) -> Tensor:
        change: Tensor = self.u @ self.v
        size = torch.linalg.vector_norm(base.matrix()) / torch.linalg.vector_norm(change)
        planted: Tensor = 0.5 * size * change
        return planted


@dataclass(frozen=True)
class Planting(Method):
    """Plants a change at `sites`; what a method is to find."""

    sites: tuple[str, ...]

    def build(self, site: Site) -> Adapter | None:
        """The planted change, where the method under test has an adapter."""
        return Planted(site) if site.name in self.sites and len(site.shape) > 1 else None


def planted_batches(subject: Subject) -> list[tuple[Any, Tensor]]:
    """The batches with what the base would say if its adapted matrices were others."""
    _, bank = subject.adapted()
    sites = tuple(f.name for f in bank.sites("default"))
    model, plan = subject.model(), subject.plan
    torch.manual_seed(7)
    teacher = Plan(
        Planting(sites),
        target_modules=plan.target_modules,
        exclude_modules=plan.exclude_modules,
        target_parameters=plan.target_parameters,
        layers_to_transform=plan.layers_to_transform,
        layers_pattern=plan.layers_pattern,
        layer_replication=plan.layer_replication,
    )
    attach(model, teacher)
    return list(zip(subject.batches, subject.outputs(model)))


class Enough(Exception):
    """Stops a training at a step of the test's choice."""


def train(subject: Subject, model: nn.Module, batches: list[Any], stop: int | None = None, **fit: Any) -> list[float]:
    """Train by `rankloom.train.fit` against planted outputs; the losses. `stop`: break off after so many steps."""
    from rankloom.train.fit import fit as run_fit
    from rankloom.train.settings import TrainSettings

    losses: list[float] = []

    def loss(model: nn.Module, pair: tuple[Any, Tensor]) -> Tensor:
        if len(losses) == stop:
            raise Enough
        found = F.mse_loss(subject.run(model, pair[0]), pair[1])
        losses.append(float(found.detach()))
        return found

    every = fit.pop("save_every", None)
    settings = TrainSettings(
        steps=subject.steps, lr=subject.lr, schedule="constant", save_every=every, dead_gradients="warn"
    )
    with contextlib.suppress(Enough):
        run_fit(model, batches, loss=loss, settings=settings, report=_ignore, **fit)
    return losses


def _ignore(row: Mapping[str, Any]) -> None:
    return None


def frozen(subject: Subject) -> None:
    """training moves the adapter and leaves the base bitwise as it was"""
    model, bank = subject.adapted()
    with bank.using():
        said = subject.output(model)
    values = base_values(model)
    start = [p.detach().clone() for p in trained(bank, "default")]
    train(subject, model, planted_batches(subject), stop=5)
    assert_base_values(model, values, "by training")
    with bank.using():
        same(subject.output(model), said, "the base's own answer before and after training the adapter")
    moved = [not torch.equal(p, old) for p, old in zip(trained(bank, "default"), start)]
    assert any(moved), "five steps of training moved no tensor of the adapter"


def gradients(subject: Subject) -> None:
    """every trainable tensor gets a gradient, and not one that is zero for ever"""
    model, bank = subject.adapted()
    largest: dict[str, float] = {}
    hooks = []
    for key, parameter, _ in bank.trainable("default"):
        keep = _keep_largest(largest, key)
        hooks.append(parameter.register_post_accumulate_grad_hook(keep))  # type: ignore[no-untyped-call]
    assert hooks, "nothing is trainable: no tensor of the adapter requires a gradient"
    try:
        train(subject, model, planted_batches(subject), stop=4)
    finally:
        for hook in hooks:
            hook.remove()
    for key, parameter, role in bank.trainable("default"):
        what = f"{key!r} {tuple(parameter.shape)} (role {role or 'none'})"
        assert key in largest, f"{what} requires a gradient and never got one: nothing that is said depends on it"
        assert largest[key] == largest[key], f"the gradient of {what} is NaN"
        assert largest[key] > 0, f"the gradient of {what} was zero in four steps: it cannot learn"


def _keep_largest(largest: dict[str, float], key: str) -> Callable[[Tensor], None]:
    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None
        largest[key] = max(float(parameter.grad.abs().max()), largest.get(key, 0.0))

    return keep


def learns(subject: Subject) -> None:
    """trained on a planted change of the base it comes clearly nearer than the frozen base"""
    batches = planted_batches(subject)
    model, bank = subject.adapted()
    with bank.using():
        before = _error(subject, model, batches)
    train(subject, model, batches)
    after = _error(subject, model, batches)
    assert after < GAIN * before, (
        f"after {subject.steps} steps at lr={subject.lr:g} the squared error to the planted change is {after:.3g}, "
        f"the frozen base's is {before:.3g}; it should be below {GAIN:g} of that (more steps=, another lr=?)"
    )


def _error(subject: Subject, model: nn.Module, batches: list[tuple[Any, Tensor]]) -> float:
    return sum(float(F.mse_loss(said, wanted)) for said, (_, wanted) in zip(subject.outputs(model), batches))


def checkpointing(subject: Subject) -> None:
    """gradient checkpointing changes neither loss nor gradients, but for the order of sums in these"""
    batch, wanted = planted_batches(subject)[0]
    seen: list[tuple[Tensor, list[Tensor | None]]] = []
    for recompute in (False, True):
        model, bank = subject.nudged()
        parameters = trained(bank, "default")
        torch.manual_seed(3)
        with training(model):
            out = checkpoint(subject.run, model, batch, use_reentrant=False) if recompute else subject.run(model, batch)
            loss = F.mse_loss(out, wanted)
            loss.backward()  # type: ignore[no-untyped-call]
        seen.append((loss.detach(), [p.grad for p in parameters]))
    (plain, grads), (again, regrads) = seen
    same(again, plain, "the loss with and without checkpointing")
    for (key, _, _), one, two in zip(bank.trainable("default"), grads, regrads):
        assert (one is None) == (two is None), f"{key!r} has a gradient only {'with' if one is None else 'without'} it"
        if one is not None and two is not None:
            gap, limit = difference(two, one), 8 * torch.finfo(one.dtype).eps
            what = f"the gradient of {key!r} with checkpointing against without (is a state kept in forward?)"
            assert gap <= limit, f"{what}: they differ by {gap:.2g} of the largest value (rounding is {limit:.2g})"


class Penalty(Rule):
    """Adds `weight` times the mean squares of all changes to the loss; hooks on the adapters tell it of them."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.changes: list[Tensor] = []

    def start(self, run: Run) -> None:
        """Listen."""
        sites = [site for name in run.bank.trained for site in run.bank.sites(name)]
        self.handles = [site.adapter.register_forward_hook(self._keep) for site in sites]

    def _keep(self, adapter: nn.Module, args: Any, change: Tensor) -> None:
        self.changes.append(change)

    def loss(self, run: Run, loss: Tensor) -> Tensor:
        """The loss with the penalty."""
        assert self.changes, "a hook on an adapter never fired: let `add` call the adapter, not its `forward`"
        size = torch.stack([change.float().square().mean() for change in self.changes]).sum()
        self.changes.clear()
        return loss + self.weight * size

    def finish(self, run: Run) -> None:
        """Stop listening."""
        for handle in self.handles:
            handle.remove()


def penalty(subject: Subject) -> None:
    """a rule may penalise what adapters give: its loss reaches their tensors"""
    few, moved = replace(subject, steps=12), []
    (base, *_), batches = few.base_outputs(), planted_batches(few)
    for weight in (0.0, 1e3):
        model, _ = few.adapted()
        train(few, model, batches, rules=[Penalty(weight)])
        moved.append(float(F.mse_loss(few.output(model), base)))
    free, penalised = moved
    assert free > 0, "twelve steps of training left the output as it was"
    assert penalised < 0.9 * free, (
        f"training moved the output by {free:.3g} (mean square), and by {penalised:.3g} with the changes heavily "
        "penalised: the penalty's gradient does not reach the adapter"
    )


class Folding(Rule):
    """Folds the adapters into the base every other step and starts them anew."""

    def after_step(self, run: Run) -> None:
        """Fold after steps 2, 4 …"""
        if run.step % 2:
            for name in run.bank.trained:
                run.bank.restart(name, run.optimizer)


def fold_resume(subject: Subject) -> None:
    """a training with a rule that folds into the base goes on from its checkpoint bit for bit"""
    steps = replace(subject, steps=max(subject.steps, 6))
    batches = planted_batches(steps)
    model, bank = steps.nudged()
    try:
        bank.fold("default")
    except (NotMergeable, StateError):
        return
    with tempfile.TemporaryDirectory() as folder:
        straight, bank = steps.adapted()
        whole = train(steps, straight, batches, stop=6, save_every=3, out=Path(folder, "a"), rules=[Folding()])
        train(steps, steps.adapted()[0], batches, stop=4, save_every=3, out=Path(folder, "b"), rules=[Folding()])
        model, again = steps.adapted(seed=5)
        rest = train(
            steps, model, batches, stop=3, save_every=3, out=Path(folder, "b"), resume="auto", rules=[Folding()]
        )
    assert rest == whole[3:], f"the losses of steps 4 to 6 are {rest} after a resume and {whole[3:]} without a break"
    _same_tensors(bank, again, "after six steps and folds, resumed against unbroken")
    assert_base_values(model, base_values(straight), "by a resume")


def resume(subject: Subject) -> None:
    """a training that broke off goes on from its checkpoint bit for bit"""
    steps = replace(subject, steps=max(subject.steps, 6))
    batches = planted_batches(subject)
    with tempfile.TemporaryDirectory() as folder:
        straight, bank = steps.adapted()
        whole = train(steps, straight, batches, stop=6, save_every=3, out=Path(folder, "a"))
        train(steps, steps.adapted()[0], batches, stop=4, save_every=3, out=Path(folder, "b"))
        model, again = steps.adapted(seed=5)
        rest = train(steps, model, batches, stop=3, save_every=3, out=Path(folder, "b"), resume="auto")
    assert rest == whole[3:], f"the losses of steps 4 to 6 are {rest} after a resume and {whole[3:]} without a break"
    _same_tensors(bank, again, "after six steps, resumed against unbroken")


def _same_tensors(bank: Bank, again: Bank, when: str) -> None:
    for (key, one, _), (_, two, _) in zip(bank.tensors("default"), again.tensors("default")):
        same(two.detach(), one.detach(), f"{key!r} {when}")
