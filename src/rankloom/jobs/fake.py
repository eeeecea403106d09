"""A forward pass without values, of models that torch cannot follow there by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

GROUPED = ("grouped_mm", "_grouped_mm")
SPEAKER = "torch._subclasses.fake_tensor"


class _GroupedProducts(TorchFunctionMode):
    """Products of sorted tokens (tokens, in) with stacked experts (E, in, out): without values torch follows them in
    bfloat16 alone. A product with one expert has the same shape and keeps the same tensors for backward.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in GROUPED and args[1].ndim == 3:
            return torch.mm(args[0], args[1][0])
        return func(*args, **(kwargs or {}))


@contextmanager
def without_values() -> Iterator[None]:
    """Tensors made here have no values; what cannot be followed raises, and says nothing besides."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    speaker = logging.getLogger(SPEAKER)
    before, speaker.disabled = speaker.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _GroupedProducts():
            yield
    finally:
        speaker.disabled = before
