"""One engine for settings: of plans, methods, stores, rules, training; constructed, from files, from flags."""

from __future__ import annotations

from rankloom.settings.engine import Setting, Settings, from_data, settings_of, to_data
from rankloom.settings.types import Count, NotNegative, Positive, Probability, Rank, Seed, Steps, Where, Within

__all__ = [
    "Count",
    "NotNegative",
    "Positive",
    "Probability",
    "Rank",
    "Seed",
    "Setting",
    "Settings",
    "Steps",
    "Where",
    "Within",
    "from_data",
    "settings_of",
    "to_data",
]
