"""An adapter is a change: `forward` changes a layer's output, `delta` changes its matrix, and the two agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.core import thin as forms
from rankloom.core.base import Base
from rankloom.core.selection import Weight
from rankloom.core.shared import Borrower
from rankloom.core.thin import Thin
from rankloom.errors import NotMergeable


class Adapter(Borrower):
    """The change at one site.

    An adapter states its thin form (`thin`) and has all else from it, or, where it is more than that, `forward` and
    `delta` (`delta` alone is enough for a fixed matrix). `roles` tags each own parameter or submodule (in, out, core,
    gate, singular, coefficient, scale, magnitude, router, whole); rules find parameters by role. `peft_names` maps own
    parameters to the checkpoint vocabulary of PEFT. `dropout`: probability of dropping elements of the change's input
    in training.
    """

    roles: ClassVar[Mapping[str, str]] = {}
    peft_names: ClassVar[Mapping[str, str]] = {}
    dropout: float = 0.0

    def __init__(self, site_name: str) -> None:
        super().__init__()
        self.site_name = site_name

    def reset(self, base: Base) -> None:
        """Fill the tensors so that the change is zero for this base (done again after a fold)."""

    def thin(self, base: Base, x: Any) -> Thin | None:
        """The thin form for the input `x`; None where the change is, or is now, more than that.

        `x` is None where there is no input: for the matrix, and at a bare parameter. A change that depends on its
        input raises `NotMergeable` there (`needs_input`).
        """
        return None

    def forward(self, x: Any, y: Tensor, base: Base) -> Tensor:
        """Δy for input `x` and base output `y`."""
        thin = self.thin(base, x)
        if thin is not None:
            return forms.change(thin, x, y, base)
        moved = base.apply(x, self.delta(base).to(y.dtype))
        shift = self.delta_bias(base)
        return moved if shift is None else moved + base.shift(y, shift.to(y.dtype))

    def delta(self, base: Base) -> Tensor:
        """ΔW of shape (…, out, in). Raises `NotMergeable` where the change has no single matrix."""
        thin = self.thin(base, None)
        if thin is None:
            raise NotMergeable(
                f"{type(self).__name__} at {self.site_name!r} has no single matrix to merge: its change depends on "
                "its input"
            )
        return forms.matrix(thin, base)

    def delta_bias(self, base: Base) -> Tensor | None:
        """Δb of shape (out,), or None."""
        thin = self.thin(base, None)
        return None if thin is None else forms.shift(thin, base)

    def row_norms(self, base: Base) -> Tensor:
        """‖W + ΔW‖ by rows, shape (…, out)."""
        thin = self.thin(base, None)
        if thin is not None:
            return forms.norms(thin, base)
        lengths: Tensor = torch.linalg.vector_norm(base.matrix() + self.delta(base), dim=-1)
        return lengths

    def repacked(self, base: Base, weight: float) -> Tensor | None:
        """The packed base weight with weight·ΔW in the same store, without loss; None where it cannot be."""
        return None

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        """out + weight·Δy; override only for exactness."""
        change = self.forward(x, y, base)
        if isinstance(weight, Tensor):
            return out + weight.to(change).reshape(*weight.shape, *(1,) * (change.ndim - weight.ndim)) * change
        return out + (change if weight == 1 else weight * change)

    def fit_to(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take these shapes for own tensors (by path) before values are loaded; a file's ranks may be smaller than the
        plan's. Shapes that the adapter cannot have are left to the loader to refuse.
        """

    def needs_input(self, x: Any) -> None:
        """Raise `NotMergeable` where there is no input to depend on."""
        if x is None:
            raise NotMergeable(
                f"{type(self).__name__} at {self.site_name!r} depends on its input: there is no single matrix to merge"
            )


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

    def __init__(self, site_name: str, parts: list[Adapter]) -> None:
        super().__init__(site_name)
        self.parts = nn.ModuleList(parts)

    def reset(self, base: Base) -> None:
        for part in self._each():
            part.reset(base)

    def thin(self, base: Base, x: Any) -> Thin | None:
        found = [part.thin(base, x) for part in self._each()]
        known = [(thin, 1.0) for thin in found if thin is not None]
        return forms.joined(known) if len(known) == len(found) else None

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
