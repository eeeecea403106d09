"""What autograd keeps for a backward pass: the tensors that hang on the graph once the forward pass is over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def kept_storages(outputs: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """The distinct storages of all tensors that the graph behind `outputs` holds, parameters among them."""
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen, found = set(waiting), {}
    while waiting:
        node: Any = waiting.pop()
        for tensor in _kept_by(node):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage
        fresh = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= fresh
        waiting += fresh
    return list(found.values())


def kept_bytes(outputs: Iterable[Tensor], aside: Iterable[Tensor] = ()) -> int:
    """Bytes of `kept_storages`, those of the tensors `aside` (the parameters) not counted."""
    own = {t.untyped_storage()._cdata for t in aside}
    return sum(s.nbytes() for s in kept_storages(outputs) if s._cdata not in own)


def _kept_by(node: Any) -> Iterator[Tensor]:
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    values += getattr(node, "saved_tensors", ())
    values += getattr(node, "aside", ())  # outputs that the fused function looks after itself
    for value in values:
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(tensor, Tensor):
                yield tensor
