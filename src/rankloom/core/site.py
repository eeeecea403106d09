"""A site: one place that is adapted, all that a method may ask while it builds, and then the adapter there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.base import Base
from rankloom.core.kinds import Kind
from rankloom.core.shared import Shared
from rankloom.errors import TargetError

LAYER = "layer"
"""Slot of a change to the layer's output; every other slot but `SHARED` is a parameter's name."""
SHARED = "shared"
"""Slot on an adapter's first layer where the tensors that its sites share are registered."""


@dataclass(eq=False)
class Site:
    """One slot of one layer: `slot` is "layer", or the name of a parameter or buffer of `layer`.

    `path`: dotted name of the layer, `name`: of the layer or of the parameter; `shape`: (…, out, in) of the matrix;
    `weight_shape`: of the raw parameter; `block`, `block_path`: number and name of the transformer block that it lies
    in, None outside of any; `hidden`: width of the model's hidden states, None where it does not tell; `groups`: blocks
    of channels that a grouped convolution keeps apart; `buffer`: the parameter is a buffer.
    What the plan adds: `index` of `count` chosen sites; `widest`: largest (out, in) among them; `dtype`, `device` for
    new tensors; `shared`: what the adapters of one name use together. `context`: what is known of the batch where the
    change is asked for as a matrix. `adapter`: once it is built.
    """

    path: str
    layer: nn.Module
    slot: str
    kind: Kind
    name: str
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    block: int | None = None
    block_path: str | None = None
    hidden: int | None = None
    index: int = 0
    count: int = 1
    widest: tuple[int, int] = (0, 0)
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    shared: Shared = field(default_factory=Shared)
    context: Mapping[str, Any] = field(default_factory=dict)
    _adapter: Adapter | None = None

    @classmethod
    def of(cls, path: str, layer: nn.Module, slot: str, kind: Kind) -> Self:
        """The site of a slot, as the model alone tells it."""
        name = path if slot == LAYER else ".".join(filter(None, (path, slot)))
        return cls(path, layer, slot, kind, name, kind.shape(layer), tuple(kind.tensor(layer).shape))

    @property
    def adapter(self) -> Adapter:
        """The adapter at this site."""
        assert self._adapter is not None, f"no adapter is built at {self.name!r} yet"
        return self._adapter

    @adapter.setter
    def adapter(self, adapter: Adapter) -> None:
        self._adapter = adapter

    @property
    def base(self) -> Base:
        """The frozen layer as the adapter sees it."""
        return Base(self.kind, self.layer, self.context)

    @property
    def out(self) -> int:
        """Rows of the matrix."""
        return self.shape[-2]

    @property
    def in_(self) -> int:
        """Columns of the matrix."""
        return self.shape[-1]

    @property
    def bare(self) -> bool:
        """True for a parameter without a layer to call: no input to see."""
        return self.kind.name == "parameter"

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias of its own."""
        return self.layer._parameters.get("bias") is not None

    @property
    def buffer(self) -> bool:
        """Whether the slot is a buffer."""
        return self.slot in self.layer._buffers

    @property
    def groups(self) -> int:
        """Blocks of channels that a grouped convolution keeps apart."""
        return self.kind.groups(self.layer)

    def empty(self, *shape: int, trainable: bool = True) -> nn.Parameter:
        """An unfilled parameter with the site's leading dims (stacked experts) before `shape`."""
        tensor = torch.empty(*self.shape[:-2], *shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(tensor, requires_grad=trainable)

    def vector(self, size: int, trainable: bool = True) -> nn.Parameter:
        """An unfilled vector (size,), with the site's leading dims before it."""
        return self.empty(size, trainable=trainable)

    def part(self, name: str, shape: tuple[int, ...]) -> Site:
        """A part of this site's matrix with a matrix of its own, for combinators."""
        return replace(self, name=name, shape=shape, weight_shape=shape)

    def needs_matrix(self, method: str) -> None:
        """Refuse a site that has no (out, in) matrix."""
        if len(self.shape) < 2:
            raise TargetError(
                f"{method}: site {self.name!r} has shape {self.shape}, not a matrix; "
                "train it whole through modules_to_save or bias instead"
            )

    def needs_input(self, method: str) -> None:
        """Refuse a bare parameter for a method whose change depends on the layer's input."""
        if self.bare:
            raise TargetError(
                f"{method}: site {self.name!r} is a bare parameter, and this method's change depends on the layer's "
                "input; choose a method with a fixed matrix (lora, dora, vera, adalora) for it"
            )

    def needs_linear(self, method: str, why: str) -> None:
        """Refuse what is no linear layer."""
        if not self.kind.linear:
            raise TargetError(f"{method}: site {self.name!r} is a {self.kind.name} layer; {why}")
