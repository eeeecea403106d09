"""Random numbers of python, numpy (where it is loaded) and torch: seeding, keeping, saving."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def seed_all(seed: int | None) -> None:
    """Seed every generator; None leaves them alone."""
    if seed is None:
        return
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(seed % 2**32)


def rng_state() -> dict[str, Any]:
    """The state of every generator, as tensors and JSON values."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        import numpy as np

        kind, keys, *rest = np.random.get_state(legacy=True)
        state["numpy"] = [str(kind), torch.tensor([int(k) for k in keys], dtype=torch.int64), *rest]
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
