"""A site: one place that may be adapted, and all that a method may ask while it builds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankloom.core.kinds import Kind
from rankloom.errors import TargetError


class Shared(nn.Module):
    """Tensors that several adapters of one name use together: registered once here, borrowed everywhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.roles: dict[str, str] = {}

    def provide(self, key: str, make: Callable[[], Tensor], *, role: str, trainable: bool) -> None:
        """Register the tensor under `key` unless it is there already."""
        if key not in self._parameters:
            self.register_parameter(key, nn.Parameter(make(), requires_grad=trainable))
            self.roles[key] = role

    def tensor(self, key: str) -> nn.Parameter:
        """The parameter registered under `key`."""
        found = self._parameters[key]
        assert found is not None
        return found


@dataclass(frozen=True)
class Site:
    """One layer or bare parameter, as the method sees it.

    `name`: dotted name in the model; `shape`: (…, out, in) of the matrix; `weight_shape`: of the raw parameter;
    `index` of `count` chosen sites; `widest`: largest (out, in) among them; `dtype`, `device` for new tensors;
    `groups`: blocks of channels that a grouped convolution keeps apart.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    has_bias: bool
    index: int
    count: int
    widest: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    shared: Shared
    buffer: bool = False
    groups: int = 1

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

    def empty(self, *shape: int, trainable: bool = True) -> nn.Parameter:
        """An unfilled parameter with the site's leading dims (stacked experts) before `shape`."""
        tensor = torch.empty(*self.shape[:-2], *shape, dtype=self.dtype, device=self.device)
        return nn.Parameter(tensor, requires_grad=trainable)

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
