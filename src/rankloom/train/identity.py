"""What must be the same for a resumed run to be the same run: base, adapters, and the settings that steer it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from rankloom.core.fingerprint import short
from rankloom.core.plan import Plan, plan_data
from rankloom.errors import SettingsError, StateError
from rankloom.train.modes import bank_or_none
from rankloom.train.settings import TrainSettings

STEERING = (
    "optimizer", "lr", "weight_decay", "betas", "eps", "schedule", "warmup_steps", "warmup_ratio", "accumulate", "clip",
    "precision", "seed", "context",
)  # fmt: skip


def identity(model: nn.Module, settings: TrainSettings) -> dict[str, Any]:
    """Base, adapters with their weights, and settings of a run, as JSON values."""
    bank = bank_or_none(model)
    adapters: dict[str, Any] = {}
    for name, weight in bank.active.items() if bank is not None else ():
        assert bank is not None
        shown = weight if isinstance(weight, (int, float)) else "tensor"
        adapters[name] = {"weight": shown, "plan": _described(bank.plans[name])}
    data = {
        "base": None if bank is None else bank.original(),
        "adapters": adapters,
        "settings": dataclasses.asdict(settings),
    }
    return dict(json.loads(json.dumps(data)))


def _described(plan: Plan) -> Any:
    """The plan as data; as text where a part of it is registered nowhere, which files could not name."""
    try:
        return plan_data(plan)
    except SettingsError:
        return repr(plan)


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another base, other adapters or other steering settings; more steps are warned of."""
    if saved["base"] != now["base"]:
        raise StateError(
            f"the checkpoint was made on another base model (fingerprint {short(saved['base'])}, here "
            f"{short(now['base'])}): load the same base, in the same dtype"
        )
    for name in sorted(saved["adapters"].keys() | now["adapters"].keys()):
        old, new = saved["adapters"].get(name), now["adapters"].get(name)
        if old != new:
            raise StateError(
                f"adapter {name!r} is {new} here and {old} in the checkpoint: attach the same plan and weight"
            )
    for key in STEERING:
        old, new = saved["settings"].get(key), now["settings"].get(key)
        if old != new:
            raise StateError(
                f"{key}={new!r}, but the checkpoint was made with {key}={old!r}: resume with the same settings, or "
                "start anew with another out="
            )
    if saved["settings"]["steps"] != now["settings"]["steps"]:
        warnings.warn(
            f"steps={now['settings']['steps']}, the checkpoint's run had {saved['settings']['steps']}: the schedule's "
            "remaining rates change, so the run is not the one that was interrupted",
            stacklevel=4,
        )
