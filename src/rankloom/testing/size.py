"""How many numbers a method trains, on a model of real size and without its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rankloom.core.attach import attach
from rankloom.core.method import Method
from rankloom.core.plan import Plan, as_plan
from rankloom.testing.check import Check


def count(method: Method | Plan, expected: int, make: Callable[[], nn.Module], **plan: Any) -> Check:
    """A check that `method` trains exactly `expected` numbers on the model of `make()`.

    `make` is called on the meta device, so a model of any size costs nothing. Keywords change the plan.
    """
    chosen = as_plan(method, plan)
    name = type(chosen.method).__name__

    def body() -> None:
        with torch.device("meta"):
            model = make()
        bank = attach(model, chosen)
        sizes = {key: p.numel() for key, p, _ in bank.trainable("default")}
        off_meta = [key for key, p, _ in bank.tensors("default") if not p.is_meta]
        assert not off_meta, f"{off_meta[0]!r} is not on the meta device with its base" if off_meta else ""
        found = sum(sizes.values())
        one = next(iter(sizes))
        assert found == expected, (
            f"{found:,} trainable numbers in {len(sizes)} tensors, the formula gives {expected:,} "
            f"({found - expected:+,}); {one!r} for one has {sizes[one]:,}"
        )

    return Check("count", "the number of trained parameters is the formula's", body, name)
