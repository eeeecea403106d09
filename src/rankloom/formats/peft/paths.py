"""Names inside a PEFT file: its wrappers put `base_layer` into the names of what they wrap."""

from __future__ import annotations

from collections.abc import Container

from rankloom.core.site import LAYER, Site
from rankloom.formats.view import View

PREFIX = "base_model.model."
WRAPPED = "base_layer"


class Paths:
    """PEFT's name for every place of a view: one wrapper for a layer, one for each adapted parameter of a module.

    The wrappers of several parameters of one module are nested in the order of its parameters, the last one outermost.
    """

    def __init__(self, view: View) -> None:
        self.slots: dict[str, list[str]] = {}
        self.stems: dict[str, str] = {}
        for site, _ in view.adapted:
            self.slots.setdefault(site.path, []).append(site.slot)
        for path, slots in self.slots.items():
            order = [LAYER, *view.modules[path]._parameters]
            slots.sort(key=order.index)

    def module(self, path: str) -> str:
        """Full name of the module `path`, wrappers of its ancestors included, its own not."""
        above, dot, part = path.rpartition(".")
        return self._within(above) + part if dot else PREFIX + part

    def site(self, site: Site) -> str:
        """Full name of the wrapper that holds this place's tensors."""
        slots = self.slots[site.path]
        outside = len(slots) - 1 - slots.index(site.slot)
        return ".".join([self.module(site.path), *[WRAPPED] * outside])

    def _within(self, path: str) -> str:
        """What the full names of all modules directly below `path` begin with."""
        if path not in self.stems:
            self.stems[path] = self.inner(path) + "."
        return self.stems[path]

    def inner(self, path: str) -> str:
        """Full name of the module itself, below its own wrappers."""
        return ".".join([self.module(path), *[WRAPPED] * len(self.slots.get(path, ()))])


def strip(key: str, modules: Container[str]) -> str:
    """A key of a PEFT file without prefix and wrappers; a module of the model that is called like one stays."""
    path = ""
    for part in key.removeprefix(PREFIX).split("."):
        inner = f"{path}.{part}" if path else part
        path = path if part == WRAPPED and inner not in modules else inner
    return path
