"""Triton kernels beside the torch references of `ops` and `store`; imported only where a CUDA tensor meets Triton."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def usable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """True for a CUDA tensor that holds numbers (nothing traces it), a `dtype` that the kernels compute in, and Triton
    (extra `kernels`) installed.
    """
    if not tensor.is_cuda or torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return dtype.is_floating_point and dtype.itemsize in (2, 4) and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
