"""An adapter in memory under PEFT's keys, as its file would have them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rankloom.core.attach import bank_of
from rankloom.errors import SettingsError, StateError, suggest
from rankloom.formats.entry import Entry
from rankloom.formats.peft import translator_for
from rankloom.formats.saving import collect
from rankloom.formats.view import view


def state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """The tensors of the adapter `name` by the keys of adapter_model.safetensors, on the CPU. In our own keys:
    `model.rankloom.state(name)`. Raises `SettingsError` for an adapter that PEFT cannot hold, with the reasons.
    """
    return collect(_entries(model, name))


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], name: str = "default") -> None:
    """Write tensors under PEFT's keys into the adapter `name`. Raises `StateError` before anything is written for keys
    that are missing or unknown and for other shapes.
    """
    entries = {entry.key: entry for entry in _entries(model, name)}
    for key in entries.keys() - tensors.keys():
        raise StateError(f"load_state: no tensor {key!r} for the adapter {name!r}{suggest(key, tensors)}")
    for key in tensors.keys() - entries.keys():
        raise StateError(f"load_state: the adapter {name!r} has no tensor {key!r}{suggest(key, entries)}")
    for key, entry in entries.items():
        wanted = tuple(entry.get().shape)
        if tuple(tensors[key].shape) != wanted:
            raise StateError(f"load_state: {key!r} has shape {tuple(tensors[key].shape)}, {name!r} needs {wanted}")
    for key, entry in entries.items():
        entry.put(tensors[key].to(entry.get().device))


def _entries(model: nn.Module, name: str) -> list[Entry]:
    found = view(bank_of(model), name)
    translator, problems = translator_for(found)
    if translator is None or problems:
        raise SettingsError(f"PEFT's keys have no place for the adapter {name!r}: {'; '.join(problems)}")
    return translator.entries(found)
