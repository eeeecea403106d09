"""An adapter is a change: `forward` changes a layer's output, `delta` changes its matrix, and the two must agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rankloom.core.kinds import Base
from rankloom.core.site import Shared, Site
from rankloom.core.switch import Weight
from rankloom.errors import NotMergeable


class Thin(NamedTuple):
    """A change as thin factors: s·B A on the dropped input, and for DoRA the rows' lengths.

    A (r, in), B (out, r); `dropout` as it acts now; `magnitude` (out,) replaces the lengths of the rows of W + s·B A,
    which are constants; `square` (out,) is ‖W‖² by rows.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0
    magnitude: Tensor | None = None
    square: Tensor | None = None


class Adapter(nn.Module):
    """The change at one site.

    `roles` tags each own parameter or submodule (in, out, core, gate, singular, coefficient, scale, magnitude, router,
    whole); rules find parameters by role. `peft_names` maps own parameters to the checkpoint vocabulary of PEFT.
    `dropout`: probability of dropping elements of the change's input in training.
    """

    roles: ClassVar[Mapping[str, str]] = {}
    peft_names: ClassVar[Mapping[str, str]] = {}
    dropout: float = 0.0

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site_name = site.name
        self._borrowed: dict[str, tuple[Shared, str]] = {}

    def reset(self, base: Base) -> None:
        """Fill the tensors so that the change is zero for this base (done again after a fold)."""

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        """Δy for input `x` and base output `y`; by default through `delta`."""
        return base.apply(x, self.delta(base).to(y.dtype))

    def delta(self, base: Base) -> Tensor:
        """ΔW of shape (…, out, in). Raises `NotMergeable` where the change has no single matrix."""
        raise NotMergeable(
            f"{type(self).__name__} at {self.site_name!r} depends on its input: there is no single matrix to merge"
        )

    def thin(self, base: Base) -> Thin | None:
        """What `forward` says, as thin factors, at a linear layer; None where it is more than that.

        Two factors without a magnitude depend on own tensors, `training`, `dropout`, `scaling` and the layer alone.
        """
        return None

    def delta_bias(self, base: Base) -> Tensor | None:
        """Δb of shape (out,), or None."""
        return None

    def repacked(self, base: Base, weight: float) -> Tensor | None:
        """The packed base weight with weight·ΔW in the same store, without loss; None where it cannot be."""
        return None

    def row_norms(self, base: Base) -> Tensor:
        """‖W + ΔW‖ by rows, shape (…, out)."""
        norms: Tensor = torch.linalg.vector_norm(base.matrix() + self.delta(base), dim=-1)
        return norms

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        """out + weight·Δy; override only for speed or exactness."""
        change = self.forward(x, y, base)
        if isinstance(weight, Tensor):
            return out + weight.to(change).reshape(*weight.shape, *(1,) * (change.ndim - weight.ndim)) * change
        return out + (change if weight == 1 else weight * change)

    def borrow(self, shared: Shared, **keys: str) -> None:
        """Read the shared tensor `keys[attribute]` as `self.attribute` without owning it."""
        for attribute, key in keys.items():
            self._borrowed[attribute] = (shared, key)

    def __getattr__(self, name: str) -> Any:
        borrowed = self.__dict__.get("_borrowed")
        if borrowed and name in borrowed:
            shared, key = borrowed[name]
            return shared.tensor(key)
        return super().__getattr__(name)


_SILENT = {"__init__", "reset", "extra_repr"}
"""What a subclass may replace without saying something else."""


def thin_of(adapter: Adapter, base: Base) -> Thin | None:
    """`adapter.thin`, unless a subclass or the object itself has replaced what the class of `thin` says."""
    cls: Any = type(adapter)
    own = adapter.__dict__
    replaced = not _thin_speaks(cls) or "forward" in own or "add" in own
    return None if replaced else adapter.thin(base)


@cache
def _thin_speaks(cls: Any) -> bool:
    owner = next(c for c in cls.__mro__ if "thin" in vars(c))
    said = {name for name, value in vars(owner).items() if callable(value)} | {"forward", "add"}
    below = cls.__mro__[: cls.__mro__.index(owner)]
    return owner is not Adapter and not any((said - _SILENT) & vars(c).keys() for c in below)


def pair_of(adapter: Adapter, base: Base) -> Thin | None:
    """The two factors of a change that is now nothing but their product; else None."""
    thin = thin_of(adapter, base)
    return None if thin is None or thin.magnitude is not None or thin.dropout else thin


def take_dropout(adapter: Adapter) -> float:
    """Switch off the input dropout of `adapter` and of those inside it; returns the largest probability that it had.

    For combinators that drop the input themselves, or that hold a copy which must not drop.
    """
    inside = [m for m in adapter.modules() if isinstance(m, Adapter)]
    p = max(m.dropout for m in inside)
    for m in inside:
        m.dropout = 0.0
    return p


def tensors_by_role(adapter: Adapter) -> Iterator[tuple[str, nn.Parameter, str]]:
    """(path, parameter, role) of every parameter that the adapter owns, combinators' inner adapters included."""
    for path, parameter in adapter.named_parameters():
        owner: nn.Module = adapter
        parts = path.split(".")
        role = ""
        for depth, part in enumerate(parts):
            if isinstance(owner, Adapter):
                role = type(owner).roles.get(part, role)
            if depth < len(parts) - 1:
                owner = owner.get_submodule(part)
        yield path, parameter, role


class Sum(Adapter):
    """Several changes at one site under one name: changes add up."""

    def __init__(self, site: Site, parts: list[Adapter]) -> None:
        super().__init__(site)
        self.parts = nn.ModuleList(parts)

    def reset(self, base: Base) -> None:
        for part in self._each():
            part.reset(base)

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        first, *rest = self._each()
        change = first(x, y, base)
        for part in rest:
            change = change + part(x, y, base)
        return change  # type: ignore[no-any-return]

    def delta(self, base: Base) -> Tensor:
        first, *rest = self._each()
        change = first.delta(base)
        for part in rest:
            change = change + part.delta(base)
        return change

    def delta_bias(self, base: Base) -> Tensor | None:
        found = [b for part in self._each() if (b := part.delta_bias(base)) is not None]
        return torch.stack(found).sum(0) if found else None

    def _each(self) -> list[Adapter]:
        return list(self.parts)  # type: ignore[arg-type]
