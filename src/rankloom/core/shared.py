"""What several adapters of one name use together: registered once on the first layer, borrowed everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Shared(nn.Module):
    """Tensors (`provide`, `tensor`) and modules (`module`) by key; `roles` of the tensors, as in `Adapter.roles`."""

    def __init__(self) -> None:
        super().__init__()
        self.roles: dict[str, str] = {}

    def provide(self, key: str, make: Callable[[], Tensor], *, role: str, trainable: bool) -> bool:
        """Register the tensor under `key` unless it is there already; True for the first, who fills it."""
        if key in self._parameters:
            return False
        self.register_parameter(key, nn.Parameter(make(), requires_grad=trainable))
        self.roles[key] = role
        return True

    def tensor(self, key: str) -> nn.Parameter:
        """The parameter registered under `key`."""
        found = self._parameters[key]
        assert found is not None
        return found

    def module(self, key: str, make: Callable[[], M], *, role: str = "router") -> M:
        """The module under `key`, made by the first who asks; its parameters have this role."""
        if key not in self._modules:
            made = make()
            self.add_module(key, made)
            self.roles |= {f"{key}.{name}": role for name, _ in made.named_parameters()}
        found: M = self._modules[key]  # type: ignore[assignment]
        return found


class Borrower(nn.Module):
    """A module that reads some of its tensors and modules from a `Shared` without owning them."""

    def __init__(self) -> None:
        super().__init__()
        self._borrowed: dict[str, tuple[Shared, str]] = {}

    def borrow(self, shared: Shared, **keys: str) -> None:
        """Read the shared tensor or module `keys[attribute]` as `self.attribute` without owning it."""
        for attribute, key in keys.items():
            self._borrowed[attribute] = (shared, key)

    def __getattr__(self, name: str) -> Any:
        owned = self.__dict__["_parameters"].get(name) if "_parameters" in self.__dict__ else None
        if owned is not None:
            return owned
        borrowed = self.__dict__.get("_borrowed")
        if borrowed and name in borrowed:
            shared, key = borrowed[name]
            return getattr(shared, key)
        return super().__getattr__(name)
