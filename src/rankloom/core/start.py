"""A start: an initialiser that looks at the base or at data, and may change the base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from rankloom.core.view import BankView
from rankloom.settings import Settings
from rankloom.store.base import Store


@dataclass(frozen=True)
class Evidence:
    """What calibration data says, by layer name: `fisher` (out, in) of weights; `scales` (in,), `hessians` (in, in) of
    inputs.
    """

    fisher: Mapping[str, Tensor] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    hessians: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """How a start came out at one site: the `errors` of its iterates and the `best` of them, which was taken."""

    errors: tuple[float, ...]
    best: int


Calibration = Iterable[Mapping[str, Any]]
"""Batches of keyword arguments for a model."""


class Start(Settings, ABC):
    """Fills the adapters of a plan after their methods did, and may replace the weights below them by packed ones."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration data."""
        return False

    def gather(self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Calibration) -> Evidence:
        """Look at data; the model is the base only."""
        return Evidence()

    @abstractmethod
    def check(self, bank: BankView, name: str) -> int:
        """Refuse adapters that it cannot fill, before anything is touched; the largest rank among them."""

    @abstractmethod
    def apply(self, bank: BankView, name: str, stores: Mapping[str, Store], evidence: Evidence) -> dict[str, Started]:
        """Fill the adapters of `name` and pack the weights below them, each in its store; by site name."""
