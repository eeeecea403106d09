"""Numbers in a config or plan that would cost memory or time: all within the limits before anything is built."""

from __future__ import annotations

from typing import Any

from rankloom.errors import FileError
from rankloom.formats.limits import Limits

RANKS = ("r", "init_r", "target_r")
ALPHAS = ("lora_alpha", "alpha")
FREE = ("seed", "key", "step", "tinit", "tfinal", "deltaT", "rules", "token")
"""Parts of names whose numbers cost nothing."""


def check_numbers(data: dict[str, Any], where: str, limits: Limits) -> None:
    """Refuse ranks, alphas, long lists and (inside a native `plan` or `method`) counts out of bounds, by field."""
    _walk(data, where, limits, "", counts="method" in data)


def _walk(data: Any, where: str, limits: Limits, field: str, counts: bool) -> None:
    _check_entries(data, where, limits, field)
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        name = field if isinstance(data, list) else str(key)
        if isinstance(value, (dict, list)):
            _walk(value, where, limits, name, counts or name in ("plan", "method"))
        elif type(value) in (int, float):
            _check(value, name, field, where, limits, counts)


def _check(value: float, key: str, field: str, where: str, limits: Limits, counts: bool) -> None:
    if key in RANKS or field == "rank_pattern":
        if type(value) is int and not 0 < value <= limits.rank:
            raise FileError(f"{where}: {key}={value}: a rank is from 1 to {limits.rank}")
    elif key in ALPHAS or field == "alpha_pattern":
        if not abs(value) <= limits.alpha:
            raise FileError(f"{where}: {key}={value}: at most {limits.alpha:g} in size")
    elif counts and type(value) is int and abs(value) > limits.count and not _free(key, field):
        raise FileError(f"{where}: {key}={value}: at most {limits.count}")


def _check_entries(data: dict[str, Any] | list[Any], where: str, limits: Limits, field: str) -> None:
    most = limits.entries
    if field in ("rank_pattern", "alpha_pattern") and not any(isinstance(v, list) for v in _values(data)):
        most = limits.patterns
    if len(data) > most:
        raise FileError(f"{where}: {field or 'the object'} has {len(data)} entries; at most {most}")
    if field == "layer_replication":
        pairs = [pair for pair in _values(data) if isinstance(pair, list) and len(pair) == 2]
        blocks = sum(max(0, pair[1] - pair[0]) for pair in pairs if all(type(n) is int for n in pair))
        if blocks > limits.blocks:
            raise FileError(f"{where}: layer_replication makes {blocks} blocks; at most {limits.blocks}")


def _values(data: dict[str, Any] | list[Any]) -> list[Any]:
    return list(data.values()) if isinstance(data, dict) else data


def _free(key: str, field: str) -> bool:
    return any(part in name for part in FREE for name in (key, field))
