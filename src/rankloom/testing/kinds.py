"""Every kind of layer works, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from rankloom.errors import TargetError
from rankloom.testing import matrix, start
from rankloom.testing.subject import Subject
from rankloom.testing.trace import assert_unchanged, snapshot

IN, OUT = 18, 24


class Alone(nn.Module):
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
    """Uses a matrix that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


@dataclass(frozen=True)
class Sample:
    """One kind of layer: how to make it, what it eats, and the words by which a refusal may call it."""

    layer: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    words: tuple[str, ...]


SAMPLES = {
    "linear": Sample(partial(nn.Linear, IN, OUT), partial(torch.randn, 3, 4, IN), ("linear",)),
    "conv1d_transposed": Sample(partial(Transposed, OUT, IN), partial(torch.randn, 3, 4, IN), ("conv1d",)),
    "embedding": Sample(partial(nn.Embedding, IN, OUT), partial(torch.randint, IN, (3, 4)), ("embedding",)),
    "conv2d": Sample(partial(nn.Conv2d, 6, OUT, 3, padding=1), partial(torch.randn, 3, 6, 5, 5), ("conv2d",)),
    "parameter": Sample(Owner, partial(torch.randn, 3, 4, IN), ("parameter",)),
}


def kind(name: str, subject: Subject) -> None:
    """this kind of layer works, or is refused with a TargetError that names site and kind"""
    sample = SAMPLES[name]
    one = _alone(sample, subject)
    model = one.model()
    before = snapshot(model)
    try:
        one.add(model, "default")
    except TargetError as refusal:
        said = str(refusal).lower()
        for what, words in (("site, 'layer'", ("'layer",)), (f"kind, {name!r}", sample.words)):
            if not any(word in said for word in words):
                raise AssertionError(f"the refusal must name the {what}; it says {str(refusal)!r}") from refusal
        assert_unchanged(before, model, "after the refusal")
        return
    for check in (start.identity, start.speaks, start.silence, matrix.delta, matrix.merge, start.detached):
        try:
            check(one)
        except AssertionError as error:
            raise AssertionError(f"on a {name} layer, {check.__name__}: {error}") from error


def _alone(sample: Sample, subject: Subject) -> Subject:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Alone(sample.layer())

    torch.manual_seed(1)
    batch = sample.batch()
    bare = isinstance(sample.layer(), Owner)
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
