"""Random numbers of python, numpy (where it is loaded) and torch: seeding, keeping, saving."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from rankloom.train.digest import digest


def seed_all(seed: int | None) -> None:
    """Seed every generator; None leaves them alone."""
    if seed is None:
        return
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(seed % 2**32)


Snapshot = dict[str, Any]
"""The state of every generator as they give it: quick to take, for `rng_state` to bring into a form that is saved."""


def snapshot() -> Snapshot:
    """The state of every generator, now."""
    found: Snapshot = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        import numpy as np

        found["numpy"] = np.random.get_state(legacy=True)
    return found


def same_state(one: Snapshot, other: Snapshot) -> bool:
    """Whether nothing was drawn between two snapshots."""
    return one.keys() == other.keys() and digest(one) == digest(other)


def rng_state(of: Snapshot | None = None) -> dict[str, Any]:
    """The state of every generator, now or at a snapshot, as tensors and JSON values."""
    state = dict(snapshot() if of is None else of)
    version, numbers, gauss = state["python"]
    state["python"] = [version, torch.tensor(numbers, dtype=torch.int64), gauss]
    if "numpy" in state:
        kind, keys, *rest = state["numpy"]
        state["numpy"] = [str(kind), torch.from_numpy(keys.astype("int64")), *rest]
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put every generator back to `state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        devices = min(len(state["cuda"]), torch.cuda.device_count())
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"][:devices]])
    if "numpy" in state:
        import numpy as np

        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.cpu().numpy().astype("uint32"), *rest))


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Whatever is drawn inside the block leaves no trace outside."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)
