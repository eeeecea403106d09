"""What adapters tell the rules of a training about a forward pass: router probabilities, scores, penalties."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Mapping
from types import FrameType

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from rankloom.errors import StateError


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
        """Keep `tensor` if somebody reads its kind.

        Raises `StateError` under reentrant gradient checkpointing, where no gradient would come back through it.
        """
        if kind not in self.kinds or threading.get_ident() != self._thread:
            return
        if not torch.is_grad_enabled() and _in_reentrant_checkpoint():
            raise StateError(
                f"a rule reads the {kind!r} of {site!r}, and reentrant gradient checkpointing loses the gradients of "
                'what is noted: checkpoint with use_reentrant=False (a Trainer: gradient_checkpointing_kwargs={"'
                'use_reentrant": False}; rankloom.fit: TrainSettings(gradient_checkpointing=True))'
            )
        self._found.setdefault(kind, {})[site] = tensor

    def __getitem__(self, kind: str) -> Mapping[str, Tensor]:
        """What the sites wrote under `kind`, by site name; empty if none did."""
        return self._found.get(kind, {})

    def clear(self) -> None:
        """Forget the last forward pass."""
        self._found.clear()


def _in_reentrant_checkpoint() -> bool:
    """Whether this runs in the first forward pass of torch's reentrant checkpointing, which keeps no graph."""
    code = CheckpointFunction.forward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
