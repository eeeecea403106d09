"""What every PEFT file may hold beside the method's own tensors: whole tensors, token rows, words on the base."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.whole import tokens_key
from rankloom.formats.base import base_name
from rankloom.formats.entry import Entry, plain
from rankloom.formats.peft.paths import Paths
from rankloom.formats.view import View

TOKENS = ".token_adapter.trainable_tokens_delta"


def own_entries(adapter: Adapter, stem: str) -> list[Entry]:
    """The adapter's parameters under their PEFT names, as they are."""
    named = dict(adapter.named_parameters(recurse=False))
    return [plain(f"{stem}.{suffix}", named[path]) for path, suffix in adapter.peft_names.items() if path in named]


def whole_entries(view: View, paths: Paths) -> list[Entry]:
    """modules_to_save under their own names, biases inside the wrappers of their layers."""
    found = []
    for site, adapter in view.whole:
        path, slot = site.path, site.slot
        stem = paths.module(path) if view.saved_whole(path) else paths.inner(path)
        found.append(plain(f"{stem}.{slot}", adapter.value))
    return found


def token_entries(view: View, paths: Paths) -> list[Entry]:
    """The trained rows of each embedding; a tied head has none of its own."""
    shared = view.shared
    rows = {f.path: shared.tensor(tokens_key(f.path)) for f, adapter in view.tokens if adapter.lookup}
    return [plain(paths.module(path) + TOKENS, tensor) for path, tensor in rows.items()]


def about(model: nn.Module) -> dict[str, Any]:
    """What PEFT's config says of the base model, where the model says it."""
    said: dict[str, Any] = {}
    name = base_name(model)
    if name:
        said["base_model_name_or_path"] = name
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        said["task_type"] = "CAUSAL_LM"
    return said
