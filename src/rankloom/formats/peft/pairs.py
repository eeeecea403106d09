"""From an adapter of the LoRA family to the one factor pair that a LORA file holds for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rankloom.core.adapter import Adapter
from rankloom.formats.entry import Entry, mapped, plain
from rankloom.methods.asymmetric import AsymmetricLoRAAdapter
from rankloom.methods.lora import LoRAAdapter
from rankloom.methods.residual import ResidualAdapter

LEAVES = (LoRAAdapter, AsymmetricLoRAAdapter)


class Pair(NamedTuple):
    """A (…, rank, in), B (…, out, rank) and perhaps a bias (out,), by name; the change is scaling·B A."""

    parts: dict[str, Entry]
    rank: int
    scaling: float


def normed(adapter: Adapter) -> bool:
    """Whether the rows of W + ΔW have trained lengths that PEFT knows, as DoRA's."""
    return "magnitude" in type(adapter).peft_names


def within(adapter: Adapter) -> Adapter:
    """The change inside DoRA, or the adapter itself."""
    inner = adapter.inner if normed(adapter) else adapter
    assert isinstance(inner, Adapter)
    return inner


def leaf(adapter: Adapter) -> LoRAAdapter | None:
    """The trained LoRA inside DoRA and a residual; None where the adapter is built of something else."""
    inner = within(adapter)
    if isinstance(inner, ResidualAdapter):
        inner = inner.inner
    return inner if type(inner) in LEAVES else None  # type: ignore[return-value]


def dropout_of(adapter: Adapter) -> float:
    """The input dropout of the change, whichever adapter of the chain applies it."""
    return max(module.dropout for module in adapter.modules() if isinstance(module, Adapter))


def trained_pair(adapter: Adapter) -> Pair:
    """The trained pair alone."""
    lora = leaf(adapter)
    assert lora is not None
    parts = {"A": plain("A", lora.A), "B": plain("B", lora.B)}
    if lora.bias is not None:
        parts["bias"] = plain("bias", lora.bias)
    return Pair(parts, lora.A.shape[-2], lora.scaling)


def whole_pair(adapter: Adapter) -> Pair:
    """The pair of the whole change: for Δ_now − Δ_start both pairs side by side, at twice the rank."""
    inner = within(adapter)
    if not isinstance(inner, ResidualAdapter):
        return trained_pair(adapter)
    now, start = leaf(inner), inner.start
    assert now is not None
    assert isinstance(start, LoRAAdapter)
    parts = {
        "A": _joined("A", now.A, start.A, -2, 1.0),
        "B": _joined("B", now.B, start.B, -1, -1.0),
    }
    if now.bias is not None and start.bias is not None:
        parts["bias"] = mapped("bias", now.bias, *_shift(start.bias))
    return Pair(parts, 2 * now.A.shape[-2], now.scaling)


def forget_start(adapter: Adapter) -> None:
    """Have the change of a residual be all that is trained, as if it had started at zero."""
    inner = within(adapter)
    for parameter in inner.start.parameters() if isinstance(inner, ResidualAdapter) else ():
        torch.nn.init.zeros_(parameter)


def _joined(key: str, now: Tensor, start: Tensor, axis: int, sign: float) -> Entry:
    def get() -> Tensor:
        return torch.cat((now.detach(), sign * start.detach()), axis)

    def put(value: Tensor) -> None:
        with torch.no_grad():
            for half, held, factor in zip(value.chunk(2, axis), (now, start), (1.0, sign)):
                held.copy_(factor * half.to(held.dtype))

    return Entry(key, get, put)


def _shift(start: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return (lambda b: b - start.detach()), (lambda b: b + start.detach())
