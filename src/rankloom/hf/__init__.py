"""The bridge to transformers, TRL and datasets: everything that imports them lives here."""

from __future__ import annotations

from typing import Any


def load_model(path: str, **settings: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder, a hub id, or `microworld` (the embedded base model).

    `settings`: task ("causal-lm", "classification", "encoder"), dtype, device, revision, trust_remote_code, as in
    `rankloom.train.config.ModelSettings`. Raises `FileError` where there is no such model, else `SettingsError`.
    """
    from rankloom.hf.models import load_model as load
    from rankloom.settings.engine import build
    from rankloom.train.config import ModelSettings

    loaded = load(build(ModelSettings, {"path": path, **settings}, "load_model"))
    return loaded.model, loaded.tokenizer
