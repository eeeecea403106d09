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

RANK_DIM = {"in": -2, "out": -1, "singular": -2}
"""Where a tensor of this role counts ranks."""


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
    more_than_thin: ClassVar[str] = "its change is more than a thin form"
    """Why `thin` gives None, for people."""
    dropout: float = 0.0

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Refuse a class that changes what follows from a thin form and not the thin form itself."""
        super().__init_subclass__(**keywords)
        own = vars(cls)
        found = next((name for name in ("forward", "add", "delta", "delta_bias", "row_norms") if name in own), None)
        if found is not None and "thin" not in own and cls.thin is not Adapter.thin:
            raise TypeError(
                f"{cls.__name__} has a {found!r} of its own and inherits a thin form, which is used in its place: "
                "give it a `thin` of its own, which may return None"
            )

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

    def whole(self) -> Tensor | None:
        """The tensor that takes the place of the base's, where that is the change; of the base tensor's own shape."""
        return None

    def repacked(self, base: Base, weight: float) -> Tensor | None:
        """The packed base weight with weight·ΔW in the same store, without loss; None where it cannot be."""
        return None

    def add(self, out: Tensor, x: Any, y: Tensor, base: Base, weight: Weight) -> Tensor:
        """out + weight·Δy; override only for exactness."""
        change: Tensor = self(x, y, base)
        if isinstance(weight, Tensor):
            return out + weight.to(change).reshape(*weight.shape, *(1,) * (change.ndim - weight.ndim)) * change
        return out + (change if weight == 1 else weight * change)

    def rank_dims(self) -> dict[str, int]:
        """The dim that counts ranks, of each own tensor that has one; empty for an adapter whose ranks are fixed.

        By role: rows of in and singular tensors, columns of out tensors.
        """
        return {
            name: RANK_DIM[self.roles[name]]
            for name, tensor in self._parameters.items()
            if tensor is not None and tensor.ndim > 1 and self.roles.get(name) in RANK_DIM
        }

    def fit_to(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Take the ranks of these shapes (of own tensors, by path) before values are loaded: those of a file or a
        checkpoint may be other than the plan's. Shapes that the adapter cannot have are left to the loader to refuse.
        """
        for path, part in self.named_modules():
            if isinstance(part, Adapter):
                start = f"{path}." if path else ""
                own = {key.removeprefix(start): tuple(s) for key, s in shapes.items() if key.startswith(start)}
                part._take_ranks(own)

    def _take_ranks(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        dims = self.rank_dims()
        if not dims.keys() <= shapes.keys():
            return
        old = {name: self._parameters[name] for name in dims}
        sizes = {tensor.shape[dims[name]] for name, tensor in old.items() if tensor is not None}
        wanted = {shapes[name][dims[name]] for name in dims if len(shapes[name]) > 1}
        others = [t for n, t in (*self._parameters.items(), *self._buffers.items()) if n not in dims and t is not None]
        if len(sizes) != 1 or len(wanted) != 1 or sizes == wanted or any(sizes & set(t.shape) for t in others):
            return
        (rank,) = wanted
        made = {name: _resized(tensor, dims[name], rank) for name, tensor in old.items() if tensor is not None}
        if all(tuple(tensor.shape) == shapes[name] for name, tensor in made.items()):
            self._parameters.update(made)

    @property
    def hooked(self) -> bool:
        """Whether a hook is registered here or on an adapter inside: `forward` is then called, thin form or not."""
        parts = self.modules() if self._modules else (self,)
        return any(bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks) for m in parts)

    def needs_input(self, x: Any) -> None:
        """Raise `NotMergeable` where there is no input to depend on."""
        if x is None:
            raise NotMergeable(
                f"{type(self).__name__} at {self.site_name!r} depends on its input: there is no single matrix to merge"
            )

    @property
    def settings(self) -> int:
        """How often something other than a tensor was set anew: what was made of the adapter before is stale then."""
        count: int = self.__dict__.get("_settings", 0)
        return count + len(self._forward_hooks) + len(self._forward_pre_hooks) + len(self._backward_hooks)

    def __setattr__(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor) and self.__dict__.get(name, self) is not value:
            self.__dict__["_settings"] = self.__dict__.get("_settings", 0) + 1
        super().__setattr__(name, value)


def _resized(tensor: nn.Parameter, dim: int, rank: int) -> nn.Parameter:
    shape = list(tensor.shape)
    shape[dim] = rank
    return nn.Parameter(tensor.new_zeros(shape), requires_grad=tensor.requires_grad)


def thin_of(adapter: Adapter, base: Base, x: Any) -> Thin | None:
    """`Adapter.thin`, for who computes the change in the adapter's place; None also where hooks wait for its call."""
    return None if adapter.hooked else adapter.thin(base, x)


def fixed_thin(adapter: Adapter, base: Base) -> Thin | None:
    """`thin_of` where it is the same for every input, else None: nothing that depends on the input is computed."""
    try:
        return thin_of(adapter, base, None)
    except NotMergeable:
        return None


def borrowed(adapter: Adapter) -> Iterator[nn.Parameter]:
    """Every parameter that the adapter, or one inside it, reads without owning it."""
    for module in adapter.modules():
        for shared, key in module._borrowed.values() if isinstance(module, Adapter) else ():
            found = getattr(shared, key)
            yield from found.parameters() if isinstance(found, nn.Module) else (found,)


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


def adapts(adapter: Adapter) -> bool:
    """Whether it changes a matrix; False for one that does nothing but train tensors whole ("whole" is every role)."""
    roles = {role for *_, role in tensors_by_role(adapter)}
    for part in adapter.modules():
        for shared, key in part._borrowed.values() if isinstance(part, Adapter) else ():
            roles |= {role for name, role in shared.roles.items() if name == key or name.startswith(f"{key}.")}
    return bool(roles - {"whole"})


class Sum(Adapter):
    """Several changes at one site under one name: changes add up."""

    def __init__(self, site_name: str, parts: list[Adapter]) -> None:
        super().__init__(site_name)
        self.parts = nn.ModuleList(parts)

    def reset(self, base: Base) -> None:
        for part in self._each():
            part.reset(base)

    def thin(self, base: Base, x: Any) -> Thin | None:
        found = [thin_of(part, base, x) for part in self._each()]
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
