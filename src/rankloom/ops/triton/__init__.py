"""Triton kernels beside the torch references of `ops` and `store`; imported only where a CUDA tensor meets Triton."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """True for a CUDA tensor of a dtype that the kernels compute in, where Triton (extra `kernels`) is installed."""
    return tensor.is_cuda and tensor.element_size() in (2, 4) and tensor.is_floating_point() and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
