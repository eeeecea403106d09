"""Cross entropy over a long vocabulary, by chunks of tokens: the whole (tokens, vocabulary) logits never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor], Tensor]


def chunked_cross_entropy(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    parameters: Sequence[Tensor] = (),
    *,
    chunk: int = 1024,
    ignored: int = -100,
    terms: float | None = None,
) -> Tensor:
    """The cross entropy of head(hidden) against labels, 0-d, in float32 at least.

    Each chunk's gradients are taken as soon as its loss is known, so the head runs once for every token, and what is
    kept for the backward pass is one gradient of the shape of `hidden` and one for each parameter. Differentiable once.

    Args:
        head: (m, d) hidden states → (m, vocabulary) logits: a matrix, an adapted or a packed layer, with bias or not.
        hidden: (n, d). labels: (n,) class ids; `ignored` marks rows that do not count.
        parameters: tensors inside `head` that want a gradient; those that it does not use get none.
        chunk: rows at a time, 1 or more.
        terms: what the sum is divided by (None: the rows that count, as `F.cross_entropy` does; 0 if none does).
    """
    divisor = (labels != ignored).sum().clamp_min(1) if terms is None else terms
    wanted = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (hidden.requires_grad or wanted):
        return sum((_loss(head, h, k, ignored) for h, k in _chunks(hidden, labels, chunk)), _zero(hidden)) / divisor
    total: Tensor = _Sum.apply(head, hidden, labels, chunk, ignored, *wanted)  # type: ignore[no-untyped-call]
    return total / divisor


class _Sum(torch.autograd.Function):
    """Σ over rows of the loss, with its gradients taken chunk by chunk on the way."""

    @staticmethod
    def forward(
        ctx: Any, head: Head, hidden: Tensor, labels: Tensor, chunk: int, ignored: int, *parameters: Tensor
    ) -> Tensor:
        total, into = _zero(hidden), []
        found: list[Tensor | None] = [None] * len(parameters)
        for h, k in _chunks(hidden, labels, chunk):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                loss = _loss(head, h, k, ignored)
                first, *rest = torch.autograd.grad(loss, (h, *parameters), allow_unused=True)
            total = total + loss.detach()
            into.append(torch.zeros_like(h) if first is None else first)
            found = [_added(old, new) for old, new in zip(found, rest)]
        ctx.save_for_backward(torch.cat(into), *found)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        scaled = [None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors]
        return None, scaled[0], None, None, None, *scaled[1:]


def _added(sofar: Tensor | None, new: Tensor | None) -> Tensor | None:
    """The sum of the two, written into the first; a first one is copied, since two parameters may share a gradient."""
    if sofar is None or new is None:
        return sofar if new is None else new.clone()
    return sofar.add_(new)


def _loss(head: Head, hidden: Tensor, labels: Tensor, ignored: int) -> Tensor:
    logits = head(hidden)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, ignore_index=ignored, reduction="sum"
    )


def _chunks(hidden: Tensor, labels: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(hidden, chunk), torch.split(labels, chunk))


def _zero(hidden: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
