"""A method: frozen settings that build adapters. Leaves are parametrisations; combinators take methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Self

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.rule import Rule
from rankloom.core.site import Site
from rankloom.errors import SettingsError
from rankloom.settings import Settings


def _nothing() -> None:
    return None


def _each(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def together(undo: Iterable[Callable[[], None]]) -> Callable[[], None]:
    """One undo for many; picklable where they are."""
    steps = [step for step in undo if step is not _nothing]
    return partial(_each, steps) if steps else _nothing


@dataclass(frozen=True)
class Method(Settings, ABC):
    """Settings in PEFT's vocabulary that build the adapter of each site.

    Every setting has an effect, which the contract tries (`rankloom.testing`): `examples` gives other values of a
    setting where its type tells none; `inert` names those that change neither outputs nor training nor files, and why.
    """

    examples: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    inert: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def build(self, site: Site) -> Adapter | None:
        """Allocate the adapter for `site`; None leaves the site alone. Values are filled by `Adapter.reset`."""

    def rules(self) -> list[Rule]:
        """What the method does to training beyond gradient descent; by default what the methods inside it do."""
        return [rule for inner in self.inner_methods() for rule in inner.rules()]

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """Change the model beyond its matrices (attention, positions) and hand back the undo (picklable); by default
        what the methods inside it change.
        """
        return together(inner.patch(model) for inner in self.inner_methods())

    def inner_methods(self) -> list[Method]:
        """The methods that this one combines; empty for a leaf."""
        return [value for f in fields(self) if isinstance(value := getattr(self, f.name), Method)]

    def needs(self) -> tuple[str, ...]:
        """Names of other adapters of the bank that this one builds on: they have to be there first and to stay."""
        return tuple(name for inner in self.inner_methods() for name in inner.needs())

    def override(self, **settings: Any) -> Self:
        """A copy with `settings` changed here, or in the method inside that has them (for rank_pattern)."""
        mine = {f.name for f in fields(self)}
        own = {k: v for k, v in settings.items() if k in mine}
        rest = {k: v for k, v in settings.items() if k not in mine}
        for f in fields(self):
            inner = getattr(self, f.name)
            if rest and isinstance(inner, Method):
                own[f.name] = inner.override(**rest)
                rest = {}
        if rest:
            raise SettingsError(f"{type(self).__name__} has no setting {next(iter(rest))!r} to vary from site to site")
        return replace(self, **own)
