"""Adapter files: PEFT folders both ways, a native folder for what PEFT has not, export to plain LoRA."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankloom.formats.export import export
    from rankloom.formats.info import inspect
    from rankloom.formats.load import load
    from rankloom.formats.save import save

_HOME = {
    "export": "rankloom.formats.export",
    "inspect": "rankloom.formats.info",
    "load": "rankloom.formats.load",
    "save": "rankloom.formats.save",
}
__all__ = ["export", "inspect", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rankloom.formats' has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return list(__all__)
