"""Deeper models from the same weights: ranges of blocks repeated, every copy with adapters of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from rankloom.errors import TargetError


def replicate(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """Replace the block list by the blocks of `ranges` ([start, end) each) and return the undo.

    The first use of a block keeps the block; later uses are copies that share its parameters (SOLAR-type depth
    up-scaling, arXiv 2312.15166). The config's `num_hidden_layers` and `layer_types`, and `layer_idx`, follow.
    """
    path, blocks = _block_list(model)
    order = [i for start, end in ranges for i in range(start, end)]
    bad = [i for i in order if not 0 <= i < len(blocks)]
    if bad or not order:
        raise TargetError(f"layer_replication={list(ranges)!r}: {path!r} has blocks 0 to {len(blocks) - 1}")
    seen: set[int] = set()
    new = []
    for i in order:
        new.append(_shared_copy(blocks[i]) if i in seen else blocks[i])
        seen.add(i)
    parent = model.get_submodule(path.rpartition(".")[0])
    key = path.rpartition(".")[2]
    config = getattr(model, "config", None)
    depth = {} if config is None else _depth(config, len(blocks), order)
    old_index = [_indices(block) for block in blocks]
    setattr(parent, key, nn.ModuleList(new))
    for position, block in enumerate(new):
        _set_index(block, position)
    before = {name: getattr(config, name) for name in depth}
    for name, value in depth.items():
        setattr(config, name, value)
    return partial(_undo, parent, key, blocks, config, before, old_index)


def _depth(config: Any, blocks: int, order: Sequence[int]) -> dict[str, Any]:
    """What a configuration says of its depth, for the new order of blocks: their number, and the type of each."""
    new: dict[str, Any] = {}
    if isinstance(getattr(config, "num_hidden_layers", None), int):
        new["num_hidden_layers"] = len(order)
    types = getattr(config, "layer_types", None)
    if types is not None and len(types) == blocks:
        new["layer_types"] = [types[i] for i in order]
    return new


def _undo(parent: nn.Module, key: str, blocks: nn.ModuleList, config: Any, before: dict[str, Any], index: Any) -> None:
    setattr(parent, key, blocks)
    for values in index:
        for module, value in values:
            module.layer_idx = value
    for name, value in before.items():
        setattr(config, name, value)


def _block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists if other != n)]
    if len(outer) != 1:
        raise TargetError(f"layer_replication needs one list of blocks; found {[n for n, _ in outer] or 'none'}")
    return outer[0]


def _shared_copy(block: nn.Module) -> nn.Module:
    """A copy with its own modules and buffers; parameters and plain attributes (the config) are the block's own."""
    shared: list[Any] = list(block.parameters())
    shared += [v for m in block.modules() for v in vars(m).values() if _plain(v)]
    return copy.deepcopy(block, {id(value): value for value in shared})


def _plain(value: Any) -> bool:
    return not (callable(value) or isinstance(value, (dict, list, set, tuple)))


def _indices(block: nn.Module) -> list[tuple[nn.Module, int]]:
    return [(m, m.layer_idx) for m in block.modules() if isinstance(getattr(m, "layer_idx", None), int)]  # type: ignore[misc]


def _set_index(block: nn.Module, position: int) -> None:
    for module, _ in _indices(block):
        module.layer_idx = position  # type: ignore[assignment]
