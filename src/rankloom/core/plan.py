"""Everything a user chooses about adaptation, as one object of plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from rankloom.core.method import Method
from rankloom.core.rule import Rule
from rankloom.core.start import Start
from rankloom.errors import SettingsError
from rankloom.store.base import Keeping


@dataclass(frozen=True)
class Plan:
    """What is adapted, how, and by which rules.

    - `target_modules`: name suffixes, or one regular expression for whole names, or ``"all-linear"`` (default: every
      linear layer but the output head and `modules_to_save`).
    - `exclude_modules`: suffixes or one regular expression, taken away from the targets.
    - `target_parameters`: suffixes of bare parameters (stacked experts, attention without layers).
    - `layers_to_transform`: block indices to keep; `layers_pattern`: name of the block list, if names have several.
    - `rank_pattern`, `alpha_pattern`: other `r` / `lora_alpha` for names that match (regular expression on the end).
    - `modules_to_save`: modules trained whole; `trainable_token_indices`: embedding rows trained whole, by embedding
      name or as a list for the input embedding; `bias`: none, all, or lora_only (adapted layers).
    - `layer_replication`: ranges [start, end) of blocks that make the new, deeper model; weights are shared.
    - `store`: how the linear weights of the frozen base are kept, adapted or not ("normal_float", "uniform", "mixed" …;
      default: as they are); the output head and `store_skip_modules` stay dense. The base stays packed after `detach`.
    - `start`: fills the adapters from what the store loses ("loftq", "lq", "lqer"), after their method's own start.
    - `rules`: training rules beside the method's own; `dtype`: of the adapters ("float32", "bfloat16", …; default
      float32 for half-precision bases, else the base's own).
    """

    method: Method
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    bias: Literal["none", "all", "lora_only"] = "none"
    layer_replication: tuple[tuple[int, int], ...] = ()
    store: Keeping | None = None
    store_skip_modules: tuple[str, ...] = ()
    start: Start | None = None
    rules: tuple[Rule, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.bias not in ("none", "all", "lora_only"):
            raise SettingsError(f"bias={self.bias!r} is not one of 'none', 'all', 'lora_only'")
        if self.store is None and (self.start is not None or self.store_skip_modules):
            said = f"start={self.start}" if self.start is not None else f"store_skip_modules={self.store_skip_modules}"
            raise SettingsError(f"{said} without a store: give one, as in store='normal_float'")
