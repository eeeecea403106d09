"""Every kind of layer works, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from rankloom.core.bank import Bank
from rankloom.errors import TargetError
from rankloom.testing import matrix, start
from rankloom.testing.subject import Reached, Subject
from rankloom.testing.trace import assert_unchanged, snapshot

IN, OUT = 18, 24


class OneLayer(nn.Module):
    """A model that is one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Transposed(nn.Module):
    """Stands in for the layer of GPT-2 that keeps its weight as (in, out); kinds are told by the class's name."""

    __module__ = "transformers.pytorch_utils"
    __qualname__ = "Conv1D"

    def __init__(self, out: int, in_: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Owner(nn.Module):
    """Uses a matrix, or a stack of them, that no layer owns."""

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN) if weight is None else weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


@dataclass(frozen=True)
class Case:
    """One kind of layer: how to make it, what it eats, and the words by which a refusal may call it."""

    layer: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    words: tuple[str, ...]


CASES = {
    "linear": Case(partial(nn.Linear, IN, OUT), partial(torch.randn, 3, 4, IN), ("linear",)),
    "conv1d_transposed": Case(partial(Transposed, OUT, IN), partial(torch.randn, 3, 4, IN), ("conv1d",)),
    "embedding": Case(partial(nn.Embedding, IN, OUT), partial(torch.randint, IN, (3, 4)), ("embedding",)),
    "conv2d": Case(partial(nn.Conv2d, 6, OUT, 3, padding=1), partial(torch.randn, 3, 6, 5, 5), ("conv2d",)),
    "parameter": Case(Owner, partial(torch.randn, 3, 4, IN), ("parameter",)),
}


def kind(name: str, subject: Subject) -> None:
    """this kind of layer works, or is refused with a TargetError that names site and kind"""
    case = CASES[name]
    one = _of_case(case, subject)
    model = one.model()
    before = snapshot(model)
    try:
        one.add(model, "default")
    except TargetError as refusal:
        said = str(refusal).lower()
        for what, words in (("site, 'layer'", ("'layer",)), (f"kind, {name!r}", case.words)):
            if not any(word in said for word in words):
                raise AssertionError(f"the refusal must name the {what}; it says {str(refusal)!r}") from refusal
        assert_unchanged(before, model, "after the refusal")
        return
    for check in (start.identity, start.reached, start.base_only, matrix.delta, matrix.merge, start.detached):
        try:
            check(one)
        except AssertionError as error:
            raise AssertionError(f"on a {name} layer, {check.__name__}: {error}") from error


def stacked(subject: Subject) -> None:
    """on stacked matrices [n, out, in] it is n adapters of one matrix each, or is refused by name"""
    torch.manual_seed(0)
    weight = torch.randn(3, OUT, IN)
    many = _on_one_layer(subject, partial(Owner, weight), torch.randn(2, IN), bare=True)
    try:
        _, bank = many.nudged()
    except TargetError as refusal:
        if "'layer.weight'" not in str(refusal):
            raise AssertionError(f"the refusal must name the site, 'layer.weight': {refusal}") from refusal
        return
    (site,) = bank.sites("default")
    with torch.no_grad():
        whole, read = site.adapter.delta(site.base), Reached(site, None).answer()
    for number in range(len(weight)):
        part = partial(Owner, weight[number])
        _, single = _on_one_layer(subject, part, torch.randn(2, IN), bare=True).adapted()
        (one,) = single.sites("default")
        take_slice(_tensors(bank), _tensors(single), number)
        with torch.no_grad():
            what = f"matrix {number} of the stack, against an adapter of that matrix alone"
            subject.near(whole[number], one.adapter.delta(one.base), f"`delta` of {what}")
            subject.near(read[number], Reached(one, None).answer(), f"the parameter as it is read, {what}")


def _tensors(bank: Bank) -> dict[str, Tensor]:
    (site,) = bank.sites("default")
    return {**site.adapter.state_dict(keep_vars=True), **bank.shared_of("default").state_dict(keep_vars=True)}


@torch.no_grad()
def take_slice(stack: Mapping[str, Tensor], one: Mapping[str, Tensor], number: int) -> None:
    """Give the tensors of one matrix's adapter the values that matrix `number` of the stack has."""
    assert stack.keys() == one.keys(), f"a stack has other tensors than a matrix: {sorted(stack.keys() ^ one.keys())}"
    for key, tensor in one.items():
        whole = stack[key]
        dims = [d for d in range(whole.ndim) if (*whole.shape[:d], *whole.shape[d + 1 :]) == tuple(tensor.shape)]
        value = whole if whole.shape == tensor.shape or not dims else whole.select(dims[0], number)
        assert value.shape == tensor.shape, (
            f"{key!r} is {tuple(stack[key].shape)} on a stack and {tuple(tensor.shape)} on one matrix: leading dims "
            "come first (`site.empty`, `site.vector`), after that of a mixture's experts"
        )
        tensor.copy_(value)


def _of_case(case: Case, subject: Subject) -> Subject:
    torch.manual_seed(1)
    return _on_one_layer(subject, case.layer, case.batch(), bare=isinstance(case.layer(), Owner))


def _on_one_layer(subject: Subject, layer: Callable[[], nn.Module], batch: Tensor, bare: bool) -> Subject:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return OneLayer(layer())

    plan = replace(
        subject.plan,
        target_modules=() if bare else ("layer",),
        target_parameters=("layer.weight",) if bare else (),
        exclude_modules=(),
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        modules_to_save=(),
        trainable_token_indices=(),
        layer_replication=(),
    )
    return replace(subject, plan=plan, make=make, run=_call, batches=(batch,))


def _call(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch)
    return out
