"""A composer: many adapters and some evidence in, a weight for each adapter out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from rankloom.core.bank import Bank
from rankloom.settings import Settings


class Composer(Settings, ABC):
    """Settings that choose weights for adapters of a bank."""

    @abstractmethod
    def __call__(self, bank: Bank, names: Sequence[str], **evidence: Any) -> dict[str, float]:
        """Weights by name, for `Bank.use(**weights)`, `merge` or `rankloom.combine`; names without one stay off.

        The bank is left as it was. `evidence`: what it looks at (batches, a loss, embeddings), by keyword.
        """
