"""Files that name modules as older versions of transformers did, in today's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from rankloom.core.targets import base_modules
from rankloom.formats.manifest import Source
from rankloom.formats.peft.paths import PREFIX, WRAPPED

RENAMED: tuple[tuple[str, str], ...] = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.", "model.vision_tower."),
    ("vision_model.", "model.vision_model."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
)
"""Start of a name before transformers 4.52 → its start since, in models of several modalities."""


def todays_names(source: Source, model: nn.Module) -> Source:
    """The folder with every tensor of a module that this model has under another name, in that name."""
    if source.plan is not None:
        return source
    modules = dict(base_modules(model))
    header = {_today(key, modules): said for key, said in source.header.items()}
    if header.keys() == source.header.keys() or len(header) != len(source.header):
        return source
    return dataclasses.replace(source, header=header, config=_config(source.config, modules))


def _config(config: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Whole names renamed too; an expression, which was made for the old ones, left to the tensors to say."""
    said = config.get("target_modules")
    targets = None if isinstance(said, str) else [_renamed(name, modules) for name in said or ()] or None
    return {**config, "target_modules": targets}


def _today(key: str, modules: Mapping[str, nn.Module]) -> str:
    name = key.removeprefix(PREFIX)
    return key.removesuffix(name) + _renamed(name, modules)


def _renamed(name: str, modules: Mapping[str, nn.Module]) -> str:
    """A name that leads to no module, by the first of today's that does."""
    if _leads(name, modules):
        return name
    tries = (new + name.removeprefix(old) for old, new in RENAMED if name.startswith(old))
    return next((found for found in tries if _leads(found, modules)), name)


def _leads(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a name, or what is left without one or two last parts, is that of a module; wrappers aside."""
    parts = [part for part in name.split(".") if part != WRAPPED]
    shorter = (modules.get(".".join(parts[:end])) for end in (len(parts) - 1, len(parts) - 2) if end > 0)
    return ".".join(parts) in modules or any(found is not None and not found._modules for found in shorter)
