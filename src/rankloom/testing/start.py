"""The start of an adapter, and the base that it must leave alone."""

from __future__ import annotations

import torch

from rankloom.core.adapter import borrowed
from rankloom.core.attach import detach
from rankloom.core.bank import Bank
from rankloom.core.targets import base_modules, base_tensors
from rankloom.errors import NotMergeable
from rankloom.testing.subject import (
    Subject,
    assert_base_values,
    base_values,
    difference,
    nudge,
    reached_sites,
    same,
    slice_of,
    trained,
    training,
)
from rankloom.testing.trace import assert_unchanged, snapshot


def identity(subject: Subject) -> None:
    """at its start an adapter changes nothing"""
    model, bank = subject.adapted()
    assert bank.active == {"default": 1.0}, f"a model's first adapter must be active at once; active: {bank.active}"
    for number, (said, base) in enumerate(zip(subject.outputs(model), subject.base_outputs())):
        subject.near(said, base, f"batch {number}: the model with the fresh adapter is not the base (is ΔW = 0?)")


def repeats(subject: Subject) -> None:
    """in evaluation mode the same input gives the same output"""
    model, _ = subject.nudged()
    for number, (one, two) in enumerate(zip(subject.outputs(model), subject.outputs(model))):
        same(one, two, f"batch {number}, twice in evaluation mode (is dropout on, or a state carried over?)")


@torch.no_grad()
def reached(subject: Subject) -> None:
    """every site takes part: it changes its layer once the tensors that it owns or borrows move"""
    model, bank = subject.adapted()
    start = subject.output(model)
    found = {each.site.name: each for each in reached_sites(subject, model, bank, "default")}
    for site in bank.sites("default"):
        parameters = [p for p in (*site.adapter.parameters(), *borrowed(site.adapter)) if p.requires_grad]
        assert site.name in found, f"site {site.name!r} is not reached: the first batch never calls its layer"
        before, kept = found[site.name].answer().clone(), [p.detach().clone() for p in parameters]
        nudge(parameters)
        gap = difference(found[site.name].answer(), before)
        moved = not parameters or gap > subject.limit(before)
        assert moved, f"site {site.name!r} is not reached: its trained tensors moved and its layer's output did not"
        for parameter, value in zip(parameters, kept):
            parameter.data.copy_(value)
    assert trained(bank, "default"), "nothing is trainable: no tensor of the adapter requires a gradient"
    nudge(trained(bank, "default"))
    gap = difference(subject.output(model), start)
    assert gap > subject.limit(start), "all trained tensors moved and the model's output did not"


def base_only(subject: Subject) -> None:
    """with no adapter selected the model is bitwise the base"""
    model, bank = subject.nudged()
    base = subject.base_outputs()
    with bank.using():
        for number, (said, wanted) in enumerate(zip(subject.outputs(model), base)):
            same(said, wanted, f"batch {number} inside `with bank.using():` against the base")
    bank.use()
    for number, (said, wanted) in enumerate(zip(subject.outputs(model), base)):
        same(said, wanted, f"batch {number} after `bank.use()` against the base")


def base(subject: Subject) -> None:
    """names, types, tensors and values of the base stay, and none of it trains"""
    model = subject.model()
    children = {path: dict(module._modules) for path, module in base_modules(model)}
    types = {path: type(module) for path, module in base_modules(model)}
    tensors = {f"{path}.{key}": value for path, _, key, value in base_tensors(model)}
    keys, values = set(model.state_dict()), base_values(model)
    bank = subject.add(model, "default")
    assert_base_values(model, values, "by attach: `reset` may read the base and not write it")
    now = dict(base_modules(model))
    assert now.keys() == types.keys(), f"modules came or went with attach: {sorted(now.keys() ^ types.keys())[:3]}"
    for path, module in now.items():
        assert isinstance(module, types[path]), f"{path!r} is now a {type(module).__name__}, not a {types[path]}"
        held = {k: v for k, v in module._modules.items() if k != "adapters"}
        assert held == children[path], f"the children of {path!r} changed with attach"
    lost = keys - set(model.state_dict())
    assert not lost, f"the state dict has lost base keys, {sorted(lost)[0]!r} for one"
    for path, _, key, value in base_tensors(model):
        name = f"{path}.{key}"
        assert value is tensors[name], f"{name!r} is another tensor object than before attach"
        assert not value.requires_grad, f"the base tensor {name!r} still requires a gradient"
    nudge(trained(bank, "default"))
    subject.output(model)
    with training(model):
        subject.run(model, subject.batches[0]).float().square().mean().backward()  # type: ignore[no-untyped-call]
    assert_base_values(model, values, "by a forward and backward pass: `forward` may read the base and not write it")


def detached(subject: Subject) -> None:
    """after detach the model is exactly what was handed in"""
    model = subject.model()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0 and parameter.is_floating_point())
    subject.output(model)
    before, said = snapshot(model), subject.output(model)
    for merged in (False, True):
        bank = subject.add_nudged(model, "default", 0)
        subject.output(model)
        if merged:
            _merge_if_possible(bank)
        assert detach(model) is model, "detach gives another object than the model"
        when = "after attach, merge and detach" if merged else "after attach, one forward and detach"
        assert_unchanged(before, model, when)
        same(subject.output(model), said, f"the output {when}")


def _merge_if_possible(bank: Bank) -> None:
    try:
        bank.merge("default")
    except NotMergeable:
        return


def independence(subject: Subject) -> None:
    """an example's answer does not depend on the others in its batch"""
    model, _ = subject.nudged()
    _independent(subject, model, "evaluation")
    with training(model), torch.random.fork_rng(devices=[]):
        if not _steady(subject, model):
            return
        _independent(subject, model, "training")


def _steady(subject: Subject, model: torch.nn.Module) -> bool:
    """True where training mode knows no randomness."""
    return torch.equal(subject.output(model), subject.output(model))


@torch.no_grad()
def _independent(subject: Subject, model: torch.nn.Module, mode: str) -> None:
    batch = subject.batches[0]
    together = subject.run(model, batch)
    for rows in (slice(0, 1), slice(1, None)):
        alone = subject.run(model, slice_of(batch, rows))
        shown = "row 0" if rows.start == 0 else "rows 1 and on"
        subject.near(alone, together[rows], f"{shown} alone and within the whole batch, in {mode} mode")
