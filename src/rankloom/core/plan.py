"""Everything a user chooses about adaptation, as one object of plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rankloom.core.method import Method
from rankloom.core.rule import Rule
from rankloom.core.start import Start
from rankloom.errors import SettingsError, suggest
from rankloom.registry import maker
from rankloom.settings import Rank, Settings, from_data, settings_of, to_data
from rankloom.settings.engine import build, maker_of
from rankloom.settings.values import join
from rankloom.store.base import Keeping

PATTERNS: Mapping[str, Any] = {
    "target_modules": "all-linear",
    "exclude_modules": (),
    "target_parameters": (),
    "layers_to_transform": None,
    "layers_pattern": None,
}
"""Settings that choose sites by patterns, and what each is when it says nothing."""


@dataclass(frozen=True)
class Plan(Settings):
    """What is adapted, how, and by which rules.

    - `method`: what is put at each target, by name or as an object.
    - `target_modules`: name suffixes, or one regular expression for whole names, or ``"all-linear"`` (default: every
      linear layer but the output head and `modules_to_save`; not fused experts), or ``"language"``, ``"vision"``,
      ``"audio"``: the same in that tower of a multimodal model.
    - `exclude_modules`: suffixes or one regular expression, taken away from the targets with all that is in them.
    - `target_parameters`: suffixes of bare parameters (attention without layers, stacked experts), one expression, or
      ``"all-experts"``: every matrix of fused experts.
    - `sites`: exactly these layers and bare parameters, by their whole names, in the place of all the settings that
      choose by patterns (`attach(…, like="a")`: those of the adapter a).
    - `layers_to_transform`: block indices to keep; `layers_pattern`: name of the block list, if names have several.
    - `rank_pattern`, `alpha_pattern`: other `r` / `lora_alpha` for names that match (regular expression on the end).
    - `modules_to_save`: modules trained whole; `trainable_token_indices`: embedding rows trained whole, by embedding
      name or as a list for the input embedding; `bias`: none, all, or lora_only (adapted layers).
    - `layer_replication`: ranges [start, end) of blocks that make the new, deeper model; weights are shared.
    - `store`: how the linear weights of the frozen base are kept, adapted or not ("normal_float", "uniform", "mixed" …;
      default: as they are), for good; the output head stays dense. `store_skip_modules`: name suffixes of layers that
      stay dense too.
    - `start`: fills the adapters from what the store loses ("loftq", "lq", "lqer"), after their method's own start.
    - `rules`: training rules beside the method's own; `dtype`: of the adapters ("float32", "bfloat16", …; default
      float32 for half-precision bases, else the base's own).
    """

    method: Method
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ()
    target_parameters: str | tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    rank_pattern: Mapping[str, Rank] = field(default_factory=dict)
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
        if self.sites:
            given = [name for name, unset in PATTERNS.items() if getattr(self, name) not in (unset, [], None)]
            if given:
                raise SettingsError(
                    f"sites and {given[0]}={getattr(self, given[0])!r} both say what is adapted: give one of them"
                )
        if self.store is None and (self.start is not None or self.store_skip_modules):
            said = f"start={self.start}" if self.start is not None else f"store_skip_modules={self.store_skip_modules}"
            raise SettingsError(f"{said} without a store: give one, as in store='normal_float'")

    @classmethod
    def spelled(cls, data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        """With the plan that a preset makes in the place of its name; what is said beside it goes before that plan."""
        method = data.get("method")
        given = {"name": method} if isinstance(method, str) else method
        if not isinstance(given, Mapping) or "name" not in given:
            return data
        settings = {key: value for key, value in given.items() if key != "name"}
        here = join(where, "method")
        made = maker_of(Method, given["name"], here)
        if isinstance(made, type):
            return data
        preset = plan_data(as_plan(build(made, settings, here, Method)))
        said = {**preset, **data, "method": preset["method"]}
        if isinstance(rules := data.get("rules", []), (list, tuple)):
            said["rules"] = [*preset.get("rules", []), *rules]
        for part in ("store", "start"):
            own, other = preset.get(part), data.get(part)
            if own and isinstance(other, Mapping) and other.get("name", own["name"]) == own["name"]:
                said[part] = {**own, **other}
        return said


def as_plan(plan: Plan | Method, overrides: Mapping[str, Any] | None = None) -> Plan:
    """A plan, or the plan of a method, with keyword changes."""
    overrides = dict(overrides or {})
    known = [s.name for s in settings_of(Plan) if s.name != "method"]
    for key in overrides:
        if key not in known:
            raise SettingsError(f"attach has no setting {key!r}{suggest(key, known)}")
    if isinstance(plan, Method):
        return Plan(plan, **overrides)
    if not isinstance(plan, Plan):
        raise SettingsError(f"attach needs a Plan or a method such as rankloom.LoRA(r=8), got {plan!r}")
    return replace(plan, **overrides)


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-ready data; settings at their defaults are left out."""
    return dict(to_data(plan))


def plan_from_data(data: Mapping[str, Any], where: str = "plan") -> Plan:
    """A plan from JSON data. A preset's name works as a method's. Raises `SettingsError` that names the setting."""
    plan: Plan = from_data(Plan, data, where)
    return plan


def default_plan(name: str, **settings: Any) -> Plan:
    """The plan of a registered method or preset, with its settings changed."""
    return as_plan(maker(name)(**settings))
