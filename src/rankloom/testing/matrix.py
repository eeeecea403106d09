"""The change as a matrix: merging, unmerging, folding, and its agreement with the change as an output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankloom.core import thin as forms
from rankloom.core.adapter import Adapter, fixed_thin
from rankloom.core.bank import Bank
from rankloom.core.site import LAYER
from rankloom.errors import NotMergeable
from rankloom.testing.subject import (
    Reached,
    Subject,
    assert_base_values,
    base_values,
    difference,
    nudge,
    reached_sites,
    same,
    trained,
    training,
)
from rankloom.testing.trace import assert_unchanged, snapshot


def merge(subject: Subject) -> None:
    """merged into the base it answers the same, or refuses (NotMergeable) and touches nothing"""
    model, bank = subject.nudged()
    said, before = subject.outputs(model), snapshot(model)
    if not _merged(bank):
        assert_unchanged(before, model, "merge raised NotMergeable, and yet")
        assert not bank.merged, f"merge raised NotMergeable, and yet the bank says that {bank.merged} is merged"
        for number, (now, wanted) in enumerate(zip(subject.outputs(model), said)):
            same(now, wanted, f"batch {number} after the refused merge")
        return
    assert bank.merged == ("default",), f"after merge the bank says that {bank.merged or 'nothing'} is merged"
    for number, (now, wanted) in enumerate(zip(subject.outputs(model), said)):
        subject.near(now, wanted, f"batch {number}, merged against unmerged (has `delta` the scale and the bias?)")
    scaled, half = subject.nudged()
    half.use(default=0.5)
    wanted = subject.output(scaled)
    half.merge()
    subject.near(subject.output(scaled), wanted, "merged at weight 0.5 against active at weight 0.5")


def unmerge(subject: Subject) -> None:
    """unmerge puts back the very tensors that merge replaced"""
    model, bank = subject.nudged()
    values = base_values(model)
    said, before = subject.outputs(model), snapshot(model)
    for _ in range(2):
        if not _merged(bank):
            return
        subject.output(model)
        bank.unmerge()
        assert_base_values(model, values, "by merge and unmerge")
        assert_unchanged(before, model, "after merge and unmerge")
        for number, (now, wanted) in enumerate(zip(subject.outputs(model), said)):
            same(now, wanted, f"batch {number} before merge and after unmerge")


@torch.no_grad()
def delta(subject: Subject) -> None:
    """at every site `delta` and `forward` are the same change"""
    model, bank = subject.nudged()
    sites = reached_sites(subject, model, bank, "default")
    assert sites, "no site was reached by the first batch"
    refused: list[str] = []
    for reached in sites:
        site, x = reached.site, reached.x
        name = site.name
        with bank.using():
            y = reached.answer()
            said = site.adapter(x, y, site.base)
            added = site.adapter.add(y, x, y, site.base, 1.0)
        assert said.dtype == y.dtype, f"site {name!r}: `forward` gives {said.dtype} for an output in {y.dtype}"
        subject.near(added, y + said, f"site {name!r}: what `add` makes of y, against y + `forward`")
        try:
            change = site.adapter.delta(site.base)
        except NotMergeable:
            refused.append(name)
            continue
        assert tuple(change.shape) == site.shape, (
            f"site {name!r}: `delta` has shape {tuple(change.shape)}, the matrix {site.shape}"
        )
        subject.near(
            said, _applied(reached, y, change), f"site {name!r}: `forward` against `delta` applied to the input"
        )
    assert len(refused) in (0, len(sites)) or not _merged(bank), (
        f"`delta` refuses at {refused[0]!r} and merge went through all the same"
    )


def thin(subject: Subject) -> None:
    """where there is a thin form, it is what `forward` and `delta` give, and what the fused path trains"""
    model, bank = subject.nudged()
    for reached in reached_sites(subject, model, bank, "default"):
        site, name = reached.site, f"site {reached.site.name!r}"
        with torch.no_grad(), bank.using():
            y = reached.answer()
        for training_mode in (False, True):
            site.adapter.train(training_mode)
            _thin_is_forward(subject, reached, y, f"{name}, {'training' if training_mode else 'evaluation'} mode")
        site.adapter.eval()
        form = fixed_thin(site.adapter, site.base)
        if form is not None:
            with torch.no_grad():
                change, lengths = site.adapter.delta(site.base), site.adapter.row_norms(site.base)
                subject.near(forms.matrix(form, site.base), change, f"{name}: the thin form's matrix, against `delta`")
                subject.near(forms.norms(form, site.base), lengths, f"{name}: row norms, thin against `row_norms`")
    if not any(adapter.dropout for _, adapter in bank.adapters("default", of=Adapter)):
        _fused_is_plain(subject, model, bank)


@torch.no_grad()
def _thin_is_forward(subject: Subject, reached: Reached, y: Tensor, where: str) -> None:
    adapter, base = reached.site.adapter, reached.site.base
    form = adapter.thin(base, reached.x)
    if form is None:
        return
    torch.manual_seed(3)
    change = forms.change(form, reached.x, y, base)
    torch.manual_seed(3)
    subject.near(change, adapter(reached.x, y, base), f"{where}: the change of the thin form, against `forward`")


def _fused_is_plain(subject: Subject, model: nn.Module, bank: Bank) -> None:
    """The second pass with the fused path knows which layers read one input."""
    seen = []
    for fused in (False, True, True):
        bank.selector.fused = fused
        torch.manual_seed(3)
        with training(model):
            out = subject.run(model, subject.batches[0])
            out.float().square().mean().backward()  # type: ignore[no-untyped-call]
        grads = {key: p.grad for key, p, _ in bank.trainable("default")}
        model.zero_grad(set_to_none=True)
        seen.append((out.detach(), grads))
    (plain, wanted), *others = seen
    for out, grads in others:
        subject.near(out, plain, "the output in training, on the fused path against the plain one")
        for key, grad in grads.items():
            one = wanted[key]
            assert (grad is None) == (one is None), f"{key!r} has a gradient on one path of the fused and the plain"
            if grad is not None and one is not None:
                subject.near(grad, one, f"the gradient of {key!r}, on the fused path against the plain one")


def _applied(reached: Reached, y: Tensor, change: Tensor) -> Tensor:
    base = reached.site.base
    applied = base.apply(reached.x, change.to(y.dtype))
    shift = reached.site.adapter.delta_bias(base) if reached.site.slot == LAYER else None
    return applied if shift is None else applied + base.shift(y, shift.to(y.dtype))


def fold(subject: Subject) -> None:
    """folded into the base and reset, the adapter starts anew from where it was"""
    model, bank = subject.nudged()
    said, values = subject.output(model), base_values(model)
    try:
        bank.fold("default", into="dense")
    except NotMergeable:
        assert_base_values(model, values, "by a fold that was refused")
        same(subject.output(model), said, "the output after the refused fold")
        return
    with bank.using():
        folded = subject.output(model)
    subject.near(folded, said, "the base after the fold, against the base with the adapter before it")
    torch.manual_seed(1)
    bank.reset("default")
    subject.near(subject.output(model), folded, "after reset on the new base the change must be zero again")
    _grows_again(subject, model, bank, folded)


def _grows_again(subject: Subject, model: nn.Module, bank: Bank, folded: Tensor) -> None:
    nudge(trained(bank, "default"), seed=2)
    gap = difference(subject.output(model), folded)
    assert gap > subject.limit(folded), "after fold and reset the adapter changes nothing any more"


def _merged(bank: Bank) -> bool:
    """Merge; False where the method refuses, by the name of a site."""
    try:
        bank.merge()
    except NotMergeable as refusal:
        names = [f.name for f in bank.sites("default")]
        if any(name in str(refusal) for name in names):
            return False
        raise AssertionError(
            f"NotMergeable must name the site (such as {names[0]!r}) and the reason; it says {str(refusal)!r}"
        ) from refusal
    return True
