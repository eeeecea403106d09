"""In which order a layer's matrix, its input and the factors of a change are multiplied: the cheapest for their shapes
(RunLoRA, arXiv 2312.03415).
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache

MOVED = 128
"""Operations in the time that a sum into a matrix takes for each of its entries (on a CPU in float32)."""


class Order(Enum):
    """`THIN`: x Aᵀ and then Bᵀ, likewise backwards. `MERGED`: by W + s·B A, made for the product only, in both passes.
    `DENSE`: that, and the factors' gradients out of the whole matrix's, dyᵀ x.
    """

    THIN = "thin"
    MERGED = "merged"
    DENSE = "dense"


def operations(order: Order, tokens: int, shape: tuple[int, int], r: int, dx: bool) -> int:
    """Floating-point operations that a change (out, in) of rank `r` adds to both passes of its layer, the gradients of
    A and B among them; `dx`: the input has a gradient.
    """
    out, in_ = shape
    thin, build = 2 * tokens * r * (out + in_), 2 * out * in_ * r
    match order:
        case Order.THIN:
            return 2 * thin + dx * 2 * tokens * in_ * r + 2 * tokens * out * r
        case Order.MERGED:
            return build + dx * build + 2 * tokens * in_ * r + thin + 2 * tokens * out * r
        case Order.DENSE:
            return build + dx * build + 2 * tokens * out * in_ + 2 * build


@lru_cache(maxsize=4096)
def cheapest(tokens: int, layers: tuple[tuple[tuple[int, int], int], ...], dx: bool) -> Order:
    """The order that takes the least time for layers of such shapes and ranks together, by operations and by what is
    written into matrices of the layers' size.
    """
    builds = {Order.THIN: 0, Order.MERGED: 1 + dx, Order.DENSE: 2 + dx}

    def cost(order: Order) -> int:
        moved = builds[order] * MOVED * sum(out * in_ for (out, in_), _ in layers)
        return moved + sum(operations(order, tokens, shape, r, dx) for shape, r in layers)

    return min(Order, key=cost)
