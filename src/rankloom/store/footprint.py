"""What the weights of a model take, by how they are kept: measured on the tensors that are held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from rankloom.store.base import Packed, stored_tensors
from rankloom.store.bridges import bridge_of, eightbit

HALF = 2
"""Bytes of a weight in 16 bits, what ratios are to."""


@dataclass(frozen=True)
class Kept:
    """The weights kept in one way: `weights` numbers in `tensors` tensors, `bytes` of them held."""

    how: str
    tensors: int
    weights: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, scales and padding included."""
        return 8 * self.bytes / self.weights

    @property
    def ratio(self) -> float:
        """Bytes beside 16 bits a weight."""
        return self.bytes / (HALF * self.weights)


@dataclass(frozen=True)
class Footprint:
    """All parameters of a model, the largest share first; printed as a table."""

    rows: tuple[Kept, ...]

    @property
    def total(self) -> Kept:
        """Everything together."""
        each = [(r.tensors, r.weights, r.bytes) for r in self.rows]
        return Kept("total", *(sum(column) for column in zip(*each)))

    def __str__(self) -> str:
        rows = (*self.rows, self.total)
        width = max(len(r.how) for r in rows)
        lines = [f"{'kept as':<{width}}  {'tensors':>7}  {'parameters':>14}  {'bytes':>14}  {'bits':>7}  of 16 bit"]
        for r in rows:
            numbers = f"{r.tensors:>7}  {r.weights:>14,}  {r.bytes:>14,}  {r.bits_per_weight:>7.3f}  {r.ratio:>9.3f}"
            lines.append(f"{r.how:<{width}}  {numbers}")
        return "\n".join(lines)


def footprint(modules: Iterable[nn.Module]) -> Footprint:
    """Parameters, bytes and bits a weight by store, by library, or by dtype; tied tensors count once.

    `modules`: those whose own parameters count, such as `model.modules()`.
    """
    found: dict[str, Kept] = {}
    seen: set[int] = set()
    for module in modules:
        for key, weight in module._parameters.items():
            if weight is None or id(weight) in seen or not weight.numel():
                continue
            seen.add(id(weight))
            held = stored_tensors(weight) + (eightbit.beside(module) if key == "weight" else [])
            how, size = _how(weight), sum(t.numel() * t.element_size() for t in held)
            old = found.get(how, Kept(how, 0, 0, 0))
            found[how] = Kept(how, old.tensors + 1, old.weights + _count(weight), old.bytes + size)
    return Footprint(tuple(sorted(found.values(), key=lambda kept: -kept.bytes)))


def _how(weight: Tensor) -> str:
    if isinstance(weight, Packed):
        return str(weight.store)
    bridge = bridge_of(weight)
    if bridge is not None:
        return f"{bridge.library} {type(weight).__qualname__}"
    return str(weight.dtype).removeprefix("torch.")


def _count(weight: Tensor) -> int:
    bridge = bridge_of(weight)
    return weight.numel() if bridge is None else bridge.count(weight)
