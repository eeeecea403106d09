"""Several adapters, weights, rows and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.bank import Bank
from rankloom.errors import StateError
from rankloom.testing.subject import Reached, Subject, has_bare_sites, reached_sites, rows_of, same
from rankloom.testing.trace import assert_unchanged, snapshot


def _pair(subject: Subject) -> tuple[nn.Module, Bank]:
    """A model with the adapters "a" and "b", of the same plan and of other values."""
    model, _ = subject.nudged("a", 0)
    return model, subject.add_nudged(model, "b", 1)


@torch.no_grad()
def adds(subject: Subject) -> None:
    """two adapters at once add up their changes, each seeing the base alone"""
    model, bank = _pair(subject)
    for site in reached_sites(subject, model, bank, "a"):
        y, a, b, both = (_answer(bank, site, *names) for names in ((), ("a",), ("b",), ("a", "b")))
        name = site.site.name
        subject.near(both, a + b - y, f"site {name!r} under use('a', 'b'), against the base and the two changes")
        turned = _answer(bank, site, "b", "a")
        subject.near(turned, both, f"site {name!r}: the order of two adapters must not matter")


def _answer(bank: Bank, site: Reached, *names: str, **weights: Any) -> Tensor:
    with bank.using(*names, **weights):
        return site.answer()


@torch.no_grad()
def weights(subject: Subject) -> None:
    """a weight scales the change: as a number, as a tensor, and by batch row"""
    model, bank = subject.nudged("a")
    bare = has_bare_sites(bank, "a")
    for site in reached_sites(subject, model, bank, "a"):
        name = f"site {site.site.name!r}"
        y, full = _answer(bank, site), _answer(bank, site, "a")
        for weight in (0.0, 0.5, -2.0):
            wanted = y + weight * (full - y)
            subject.near(_answer(bank, site, a=weight), wanted, f"{name} at weight {weight}")
            as_tensor = _answer(bank, site, a=torch.tensor(weight))
            subject.near(as_tensor, wanted, f"{name} at weight tensor({weight})")
        if not bare:
            by_row = torch.linspace(-1, 2, y.shape[0])
            wanted = y + by_row.to(y).reshape(-1, *(1,) * (y.ndim - 1)) * (full - y)
            subject.near(_answer(bank, site, a=by_row), wanted, f"{name} with a weight of its own for each row")


def switching(subject: Subject) -> None:
    """choosing another adapter writes nothing into the model and gives that adapter's own answer"""
    model, bank = _pair(subject)
    alone = {name: subject.output(subject.nudged(name, seed)[0]) for seed, name in enumerate("ab")}
    base = subject.base_outputs()[0]
    subject.output(model)
    before = snapshot(model)
    for name in ("b", "a", "b"):
        bank.use(name)
        same(subject.output(model), alone[name], f"under use({name!r}), against a model that has only {name!r}")
        assert_unchanged(before, model, f"after use({name!r}) and one forward: switching must not write into the model")
        with bank.using():
            same(subject.output(model), base, f"inside `with bank.using():` while {name!r} is the default")
        same(subject.output(model), alone[name], f"after the block, {name!r} being the default")


def rows(subject: Subject) -> None:
    """each batch row may have an adapter of its own, given as a list of names"""
    model, bank = _pair(subject)
    count = rows_of(subject.batches[0])
    names = (["a", None, "b", "a"] * count)[:count]
    if _refused_at_parameters(subject, model, bank, names):
        return
    _rows_equal_singles(subject, model, bank, names, lambda: bank.use(rows=names))
    _rows_equal_singles(subject, model, bank, names[::-1], lambda: bank.use(rows=names[::-1]))


def rows_tensor(subject: Subject) -> None:
    """each batch row may have an adapter of its own, given as a tensor of indices"""
    model, bank = _pair(subject)
    count = rows_of(subject.batches[0])
    index = torch.tensor(([1, -1, 0, 1] * count)[:count])
    if _refused_at_parameters(subject, model, bank, index):
        return
    names = [None if i < 0 else "ab"[i] for i in index.tolist()]
    _rows_equal_singles(subject, model, bank, names, lambda: bank.use("a", "b", rows=index))


def _rows_equal_singles(
    subject: Subject, model: nn.Module, bank: Bank, names: list[str | None], choose: Callable[[], None]
) -> None:
    choose()
    mixed = subject.output(model)
    for row, name in enumerate(names):
        bank.use(*([] if name is None else [name]))
        single = subject.output(model)
        subject.near(mixed[row], single[row], f"row {row} under rows={names}, against use({name or ''!r}) for all rows")


def _refused_at_parameters(subject: Subject, model: nn.Module, bank: Bank, rows: Any) -> bool:
    """True for changes of bare parameters, the same for all rows; they must refuse by name."""
    if not has_bare_sites(bank, "a"):
        return False
    bank.use(rows=rows)
    names = [f.name for f in bank.sites("a") if f.bare]
    try:
        subject.output(model)
    except StateError as refusal:
        if any(name in str(refusal) for name in names):
            return True
        raise AssertionError(f"the refusal must name the parameter, {names[0]!r} for one: {refusal}") from refusal
    raise AssertionError(f"{names[0]!r} is a parameter, the same for all rows, and rows=… was not refused")


def threads(subject: Subject) -> None:
    """two threads that select different adapters get their own answers"""
    model, bank = _pair(subject)
    wanted = {}
    for name in ("a", "b"):
        with bank.using(name):
            wanted[name] = subject.output(model)
    start = threading.Barrier(2)
    faults: list[BaseException] = []

    def work(name: str) -> None:
        try:
            start.wait(timeout=60)
            for _ in range(4):
                with bank.using(name):
                    same(subject.output(model), wanted[name], f"the thread that selected {name!r} beside another one")
        except BaseException as error:
            faults.append(error)

    workers = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if faults:
        raise faults[0]
