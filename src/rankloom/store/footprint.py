"""What tensors take, by the way in which they are kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from rankloom.store.base import Packed


@dataclass(frozen=True)
class Kept:
    """Tensors that are kept alike: `how` in words, their number, the numbers in them, and their bytes."""

    how: str
    tensors: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of one number, scales and padding included."""
        return 8 * self.bytes / self.weights


def footprint(tensors: Iterable[Tensor]) -> tuple[Kept, ...]:
    """Every distinct tensor once, those kept alike together, the largest share first."""
    found: dict[str, list[int]] = {}
    for tensor in {id(t): t for t in tensors}.values():
        row = found.setdefault(how_kept(tensor), [0, 0, 0])
        row[0] += 1
        row[1] += tensor.numel()
        row[2] += stored_bytes(tensor)
    rows = [Kept(how, *row) for how, row in found.items()]
    return tuple(sorted(rows, key=lambda kept: -kept.bytes))


def how_kept(tensor: Tensor) -> str:
    """ "NormalFloat, 4 bits" for a packed tensor, "bfloat16" for a plain one."""
    if isinstance(tensor, Packed):
        return f"{type(tensor.store).__name__}, {getattr(tensor.store, 'bits', '?')} bits"
    return str(tensor.dtype).removeprefix("torch.")


def stored_bytes(tensor: Tensor) -> int:
    """The bytes that a tensor takes, as it is kept."""
    return tensor.stored_bytes if isinstance(tensor, Packed) else tensor.numel() * tensor.element_size()
