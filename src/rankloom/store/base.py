"""Reading a frozen weight whatever it is kept as."""

from __future__ import annotations

import torch
from torch import Tensor

from rankloom.errors import StateError


def dense(weight: Tensor) -> Tensor:
    """The plain floating-point tensor behind `weight`, of the weight's logical shape.

    A plain floating tensor is returned as it is. Raises `StateError` for a weight that no store of ours can read.
    """
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise StateError(
            f"a base weight of type {type(weight).__name__} and dtype {weight.dtype} cannot be read as numbers: "
            "load the base model in float32, bfloat16 or float16"
        )
    return weight if type(weight) is Tensor else weight.as_subclass(torch.Tensor)
