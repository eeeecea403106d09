"""How large what an adapter folder says and holds may be: one table, every row an argument."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Largest values that are read; `load(…, limits=Limits(rank=8192))` changes one."""

    config: int = 1 << 20
    header: int = 8 << 20
    metadata: int = 64 << 10
    file: int = 4 << 30
    depth: int = 12
    tensors: int = 50_000
    rank: int = 4096
    count: int = 4096
    entries: int = 10_000
    patterns: int = 512
    blocks: int = 512
    alpha: float = 1e6
    weight: float = 1e4
    name: int = 64


WORDS = {
    "config": "bytes of adapter_config.json",
    "header": "bytes of the header of the weights file",
    "metadata": "bytes of the metadata in that header",
    "file": "bytes of the weights file",
    "depth": "levels of nesting in a config, manifest or header",
    "tensors": "tensors in the weights file",
    "rank": "r, init_r, target_r and the ranks of rank_pattern",
    "count": "any other whole number in the settings of a native method, seeds and steps aside",
    "entries": "values in one list or object of a config or plan",
    "patterns": "entries of rank_pattern and alpha_pattern of a LoRA",
    "blocks": "blocks that layer_replication makes",
    "alpha": "size of lora_alpha and of the values of alpha_pattern",
    "weight": "size of a number in a tensor",
    "name": "letters of an adapter's name",
}


def table(limits: Limits | None = None) -> list[tuple[str, int | float, str]]:
    """(name, largest value, what it bounds) of every limit."""
    chosen = limits or Limits()
    return [(f.name, getattr(chosen, f.name), WORDS[f.name]) for f in dataclasses.fields(Limits)]
