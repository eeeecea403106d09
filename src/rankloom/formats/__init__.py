"""Adapter files: PEFT folders both ways, a native folder for what PEFT has not, export to plain LoRA."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankloom.formats.exporting import export
    from rankloom.formats.info import inspect
    from rankloom.formats.loading import load
    from rankloom.formats.memory import load_state, state
    from rankloom.formats.saving import save

_HOME = {
    "export": "rankloom.formats.exporting",
    "inspect": "rankloom.formats.info",
    "load": "rankloom.formats.loading",
    "load_state": "rankloom.formats.memory",
    "save": "rankloom.formats.saving",
    "state": "rankloom.formats.memory",
}
__all__ = ["export", "inspect", "load", "load_state", "save", "state"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankloom.formats' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return list(__all__)
