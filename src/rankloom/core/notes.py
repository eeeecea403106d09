"""What adapters tell the rules of a training about a forward pass: router probabilities, scores, penalties."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

from torch import Tensor


class Notes:
    """Tensors of the last forward pass, by kind and site: ``notes["router"]["layers.0.q_proj"]``.

    Only the `kinds` that somebody reads are kept, from the thread that made this object. A site has one entry of a
    kind, so a recomputed forward replaces what the first one wrote and nothing is counted twice.
    """

    def __init__(self, kinds: Collection[str] = ()) -> None:
        self.kinds = frozenset(kinds)
        self._thread = threading.get_ident()
        self._found: dict[str, dict[str, Tensor]] = {}

    def put(self, kind: str, site: str, tensor: Tensor) -> None:
        """Keep `tensor` if somebody reads its kind."""
        if kind in self.kinds and threading.get_ident() == self._thread:
            self._found.setdefault(kind, {})[site] = tensor

    def __getitem__(self, kind: str) -> Mapping[str, Tensor]:
        """What the sites wrote under `kind`, by site name; empty if none did."""
        return self._found.get(kind, {})

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._found.clear()
