"""An adapter in its place."""

from __future__ import annotations

from typing import NamedTuple

from rankloom.core.adapter import Adapter
from rankloom.core.kinds import Base
from rankloom.core.site import Site
from rankloom.core.targets import Place


class Fitted(NamedTuple):
    """An adapter in its place: the place in the model, what its method saw, and the adapter."""

    place: Place
    site: Site
    adapter: Adapter

    @property
    def base(self) -> Base:
        """The base layer as the adapter sees it."""
        return Base(self.place.kind, self.place.layer)
