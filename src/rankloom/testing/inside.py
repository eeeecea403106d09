"""What surrounds a method: a combinator, and what is known of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.core.notes import Notes
from rankloom.errors import NotMergeable, RankloomError
from rankloom.gates.constant import Constant
from rankloom.methods.dora import DoRA, DoRAAdapter
from rankloom.methods.mixture import Mixture, MixtureAdapter
from rankloom.testing import matrix, start
from rankloom.testing.kinds import take_slice
from rankloom.testing.subject import Subject, reached_sites
from rankloom.testing.trace import assert_unchanged, snapshot


def inside_dora(subject: Subject) -> None:
    """inside DoRA it gives the direction of the rows, or is refused by name"""
    dora = _inside(subject, lambda inner: DoRA(inner))
    if dora is None:
        return
    _, bank = dora.nudged()
    for site in bank.sites("default"):
        if isinstance(site.adapter, DoRAAdapter):
            wanted = site.adapter.magnitude.detach().abs()
            turned = site.base.matrix().to(wanted.dtype) + site.adapter.delta(site.base).detach()
            lengths = torch.linalg.vector_norm(turned, dim=-1)
            dora.near(lengths, wanted, f"site {site.name!r} inside DoRA: ‖W + ΔW‖ by rows (is `row_norms` right?)")


def inside_mixture(subject: Subject) -> None:
    """in a mixture its experts are n adapters of its own, each with its weight, or it is refused by name"""
    if _inside(subject, lambda inner: Mixture(inner, 2)) is None:
        return
    weights = (1.0, -0.5)
    mixture = replace(subject, plan=replace(subject.plan, method=Mixture(subject.plan.method, 2, Constant(weights))))
    (_, many), (_, single) = mixture.nudged(), subject.adapted()
    sites = {s.name: s for s in many.sites("default") if isinstance(s.adapter, MixtureAdapter)}
    sums: dict[str, Tensor] = {}
    for number, weight in enumerate(weights):
        take_slice(many.shared_of("default").state_dict(), _held(single.shared_of("default")), number)
        for site in single.sites("default"):
            if site.name in sites:
                take_slice(sites[site.name].adapter.experts.state_dict(), _held(site.adapter), number)
        try:
            found = single.delta("default")
        except NotMergeable:
            return
        sums = {name: weight * found[name] + sums.get(name, 0.0) for name in sites}
    for name, site in sites.items():
        with torch.no_grad():
            change = site.adapter.delta(site.base)
        subject.near(change, sums[name], f"site {name!r}: a mixture of two with weights {weights}, against their sum")


def _held(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)


def _inside(subject: Subject, around: Callable[[Method], Method]) -> Subject | None:
    """The subject with its method inside a combinator, once that has passed what any method must; None if refused."""
    outer = replace(subject, plan=replace(subject.plan, method=around(subject.plan.method)))
    name = type(outer.plan.method).__name__
    model = outer.model()
    before = snapshot(model)
    try:
        bank = outer.add(model, "default")
    except RankloomError as refusal:
        words = [type(subject.plan.method).__name__, *(path for path, _ in model.named_modules() if path)]
        if not any(word in str(refusal) for word in words):
            raise AssertionError(f"inside {name}: the refusal names no site: {refusal}") from refusal
        assert_unchanged(before, model, f"after the refusal inside {name}")
        return None
    assert bank.sites("default")
    for check in (start.identity, start.reached, start.base_only, matrix.delta):
        try:
            check(outer)
        except AssertionError as error:
            raise AssertionError(f"inside {name}, {check.__name__}: {error}") from error
    return outer


def context(subject: Subject) -> None:
    """what is known of the batch, and the notes of a training, reach every adapter, inner ones too"""
    model, bank = subject.nudged()
    reached = [each.site for each in reached_sites(subject, model, bank, "default")]
    notes, token = Notes(("probe",)), object()
    called: set[str] = set()

    def look(adapter: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(adapter, Adapter)
        base, what = args[-1], f"{type(adapter).__name__} at {adapter.site_name!r}"
        called.add(adapter.site_name)
        assert base.context.get("probe") is token, f"the batch's context does not reach {what}: hand its `base` on"
        assert base.notes is notes, f"what {what} notes does not reach the training: hand its `base` on"
        assert base.name == adapter.site_name, f"{what} has the base of {base.name!r}"

    inside = [m for site in bank.sites("default") for m in site.adapter.modules() if isinstance(m, Adapter)]
    handles = [m.register_forward_pre_hook(look) for m in inside]
    bank.selector.notes = notes
    try:
        with bank.using("default", context={"probe": token}):
            subject.output(model)
    finally:
        bank.selector.notes = None
        for handle in handles:
            handle.remove()
    missed = [site.name for site in reached if site.adapter.site_name not in called]
    assert not missed, f"site {missed[0]!r}: the adapter was never called; `add` is to call it, not its `forward`"
