"""A composer: many adapters and some evidence in, a weight for each adapter out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rankloom.core.bank import Bank


class Composer(Protocol):
    """What chooses weights for adapters of a bank. `evidence` is what it looks at (batches, embeddings, a loss), by
    keyword; what it returns goes to `Bank.use(**weights)`, `merge` or `rankloom.combine`. Names without a weight stay
    off. It leaves the bank as it was.
    """

    def __call__(self, bank: Bank, names: Sequence[str], **evidence: Any) -> dict[str, float]: ...
