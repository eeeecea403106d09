"""Where a tensor came from: rebuilt element by element from what autograd keeps anyway, it need not be kept itself.

Read off the graph of the forward pass, by operation and not by the name of any layer: products (SwiGLU, RMSNorm),
LayerNorm, SiLU, GELU, casts, on a CPU all of them bit for bit. A product keeps the output of its activation although
the activation keeps its own input; a reader of the product that takes that input instead (`shortcut`) lets autograd
drop the output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DEPTH = 4
"""Operations that are followed backwards at most."""


@dataclass(frozen=True, slots=True)
class Origin:
    """x = make(kept). `shortcut`: x is to be linked to `kept`, past the operations between, which are then dropped."""

    kept: tuple[Tensor, ...]
    make: Callable[[tuple[Tensor, ...]], Tensor]
    shortcut: bool = False


def origin(x: Tensor, shortcut: bool) -> Origin | None:
    """How to rebuild `x` from tensors that autograd keeps; None where it cannot be, or where others hold the reins.

    `shortcut=False` leaves every operation in the graph. Saved-tensor hooks (checkpointing, offloading) decide on
    their own what is kept, and reading through them may recompute or use it up: no origin under them.
    """
    if x.grad_fn is None or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return None
    shortcut = shortcut and not x.retains_grad and not x._backward_hooks
    try:
        found = _read(x.grad_fn, DEPTH, shortcut)
    except RuntimeError:  # a tensor in between was changed in place: backward will say so where it matters
        return None
    return found if found is not None and len(found.kept) > 0 else None


def _read(node: Any, depth: int, shortcut: bool) -> Origin | None:
    reader = _READERS.get(node.name()) if node is not None and depth else None
    return None if reader is None else reader(node, depth - 1, shortcut)


def _product(node: Any, depth: int, shortcut: bool) -> Origin | None:
    left = _factor(node, 0, node._saved_self, depth, shortcut)
    right = _factor(node, 1, node._saved_other, depth, shortcut)
    if left is None or right is None:
        return None
    cut, a, b = len(left.kept), left.make, right.make
    return Origin(left.kept + right.kept, lambda t: a(t[:cut]) * b(t[cut:]), left.shortcut or right.shortcut)


def _factor(node: Any, index: int, saved: Tensor | None, depth: int, shortcut: bool) -> Origin | None:
    """A factor of a product: kept or rebuilt; the output of an activation that nobody else holds from its input."""
    before = node.next_functions[index][0]
    if saved is None:
        return _read(before, depth, shortcut)
    if shortcut and before is not None and before.name() in _ACTIVATIONS and not _held(saved):
        behind = _READERS[before.name()](before, depth, shortcut)
        return None if behind is None else Origin(behind.kept, behind.make, True)
    return Origin((saved,), lambda t: t[0])


def _cast(node: Any, depth: int, shortcut: bool) -> Origin | None:
    before = _read(node.next_functions[0][0], depth, shortcut)
    if before is None:
        return None
    made = node._input_metadata[0]
    dtype, make = made.dtype, before.make
    return Origin(before.kept, lambda t: make(t).to(dtype), before.shortcut)


def _layer_norm(node: Any, depth: int, shortcut: bool) -> Origin | None:
    """From the mean and deviation that the node keeps, unless it keeps them in 16 bits: too few to rebuild from."""
    mean, weight, bias = node._saved_result1, node._saved_weight, node._saved_bias
    if mean.element_size() < 4 or (weight is None and bias is not None):
        return None
    dtype, dims = node._input_metadata[0].dtype, tuple(range(-len(node._saved_normalized_shape), 0))

    def make(t: tuple[Tensor, ...]) -> Tensor:
        x, mean, deviation, *affine = t
        x = x.to(mean.dtype)
        if torch.is_grad_enabled():
            mean, deviation = _moments(x, deviation, dims)
        made = (x - mean) * deviation
        made = torch.addcmul(affine[1], made, affine[0]) if len(affine) > 1 else made * affine[0] if affine else made
        return made.to(dtype)

    kept = (node._saved_input, mean, node._saved_result2, weight, bias)
    return Origin(tuple(t for t in kept if t is not None), make)


def _moments(x: Tensor, deviation: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and 1/√(variance + eps) as functions of x, with the eps that is in `deviation`."""
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return mean, (variance + (deviation**-2 - variance).detach()).rsqrt()


def _silu(node: Any, depth: int, shortcut: bool) -> Origin:
    return Origin((node._saved_self,), lambda t: F.silu(t[0]))


def _gelu(node: Any, depth: int, shortcut: bool) -> Origin:
    approximate = node._saved_approximate
    return Origin((node._saved_self,), lambda t: F.gelu(t[0], approximate=approximate))


_READERS: dict[str, Callable[[Any, int, bool], Origin | None]] = {
    "GeluBackward0": _gelu,
    "MulBackward0": _product,
    "NativeLayerNormBackward0": _layer_norm,
    "SiluBackward0": _silu,
    "ToCopyBackward0": _cast,
}
_ACTIVATIONS = ("GeluBackward0", "SiluBackward0")


def _held(saved: Tensor) -> bool:
    """Whether anyone but the graph holds the tensor, and so may wait for its gradient."""
    return sys.getrefcount(saved) > _unheld() + 1


@cache
def _unheld() -> int:
    """References to a saved tensor, seen from one call deep, that only the graph holds."""
    t = torch.ones(1, requires_grad=True)
    node: Any = (F.silu(t) * t).grad_fn
    saved = node._saved_self
    return sys.getrefcount(saved)
