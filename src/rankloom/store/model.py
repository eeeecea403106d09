"""Keeping a model's weights in stores, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from rankloom.errors import StateError, TargetError, suggest
from rankloom.store.base import Packed, Store, dense
from rankloom.store.bridges import bridge_of


@dataclass(frozen=True)
class Saving:
    """`weights`: numbers now packed; their bytes `before` and `after`; `left`: bytes of all that is not packed."""

    weights: int
    before: int
    after: int
    left: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a packed weight, scales and padding included."""
        return 8 * self.after / self.weights


def keep(model: nn.Module, stores: Mapping[str, Store]) -> Saving:
    """Pack the named parameters of `model` in place, each in its store, one after the other; they are frozen.

    Parameters that are tied stay tied. Raises `TargetError` before anything is packed if a name is no parameter.
    """
    return keep_with(model, {name: store.pack for name, store in stores.items()})


def keep_with(model: nn.Module, packers: Mapping[str, Callable[[Tensor], Packed]]) -> Saving:
    """`keep`, where each weight is packed by a function of its own."""
    owners = _owners(model)
    for name in packers:
        if name not in owners:
            raise TargetError(f"no parameter {name!r}{suggest(name, owners)}")
        if isinstance(frozen(model, name), Packed):
            raise StateError(f"{name!r} is packed already: unpack(model) first, or leave it out")
        bridge = bridge_of(frozen(model, name))
        if bridge is not None:
            raise StateError(
                f"{name!r} is kept in few bits by {bridge.library} already: load the model in 16 bits, or leave it out"
            )
    weights = before = after = 0
    for name, packer in packers.items():
        old = frozen(model, name)
        if isinstance(old, Packed):
            continue
        packed = packer(dense(old))
        weights, before = weights + old.numel(), before + old.numel() * old.element_size()
        after += packed.stored_bytes
        _put(model, owners[name], nn.Parameter(packed, requires_grad=False))
    return Saving(weights, before, after, _plain_bytes(model))


def unpack(model: nn.Module) -> list[str]:
    """Put dense parameters in place of all packed ones, one after the other; returns their names."""
    owners = _owners(model)
    packed = [name for name in owners if isinstance(frozen(model, name), Packed)]
    for name in packed:
        old = frozen(model, name)
        if isinstance(old, Packed):
            _put(model, owners[name], nn.Parameter(dense(old), requires_grad=False))
    return packed


def frozen(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name itself, whatever a property of its owner gives to those who read it."""
    path, _, leaf = name.rpartition(".")
    found = model.get_submodule(path)._parameters[leaf]
    assert found is not None
    return found


def _owners(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For the name of each parameter all names of it."""
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    return {name: tuple(names) for names in tied.values() for name in names}


def _put(model: nn.Module, names: tuple[str, ...], parameter: nn.Parameter) -> None:
    for name in names:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = parameter


def _plain_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if not isinstance(p, Packed))
