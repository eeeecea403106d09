"""AdamW with its memory in host memory: only what the last steps used lies on the device.

The paged optimizer of QLoRA, Dettmers et al., NeurIPS 2023, arXiv 2305.14314 §3; pages move by a budget of bytes, not
by the driver's page faults.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

PAGED = ("exp_avg", "exp_avg_sq")
Pages = tuple[Tensor, ...]


class Pager:
    """Device copies of host tensors, at most `budget` bytes of them besides the one in use; the least recently used is
    written back first.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._here: OrderedDict[Any, tuple[Pages, Pages]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Bytes of the copies that are there."""
        return sum(_bytes(copies) for _, copies in self._here.values())

    @property
    def keys(self) -> tuple[Any, ...]:
        """Owners of the copies that are there, the least recently used first."""
        return tuple(self._here)

    def take(self, key: Any, hosts: Pages, device: torch.device) -> Pages:
        """Copies of `hosts` on `device`, to be changed in place; `hosts` are behind until they are written back."""
        held = self._here.pop(key, None)
        if held is not None and all(a is b for a, b in zip(held[0], hosts, strict=True)):
            copies = held[1]
        else:
            self._evict(self.budget - _bytes(hosts))
            copies = tuple(h.to(device, non_blocking=True, copy=True) for h in hosts)
        self._here[key] = (hosts, copies)
        return copies

    def flush(self) -> None:
        """Write everything back and let it go."""
        self._evict(0)

    def _evict(self, room: int) -> None:
        while self._here and self.bytes > max(room, 0):
            _, (hosts, copies) = self._here.popitem(last=False)
            for host, copy in zip(hosts, copies):
                host.copy_(copy)


class PagedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, step for step, whose moments live in host memory, pinned where there is a CUDA device.

    `budget`: bytes of moments that stay on the device between steps. On the CPU host memory is the device's own, and
    nothing is copied. `flush()` before `state` is read past `state_dict()`.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, budget: int = 1 << 28, **settings: Any) -> None:
        super().__init__(params, lr=lr, **settings)
        self.pager = Pager(budget)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def flush(self) -> None:
        """Bring the moments in `state` up to date."""
        self.pager.flush()

    def state_dict(self) -> dict[str, Any]:
        """As of `torch.optim.AdamW`: either takes the other's."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """As of `torch.optim.AdamW`."""
        super().load_state_dict(state_dict)
        for parameter, memory in self.state.items():
            memory.update({name: self.get_state_buffer(parameter).copy_(memory[name]) for name in PAGED})

    def get_state_buffer(self, parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros in host memory, of the parameter's shape."""
        pinned = self._pages(parameter) and torch.cuda.is_available()
        return torch.zeros(parameter.shape, dtype=dtype or parameter.dtype, device="cpu", pin_memory=pinned)

    def _update(self, parameter: Any, group: dict[str, Any]) -> None:
        memory = self.state[parameter]
        if not memory:
            memory["step"] = torch.zeros((), dtype=torch.float32)
            memory.update({name: self.get_state_buffer(parameter) for name in PAGED})
        moments: Pages = tuple(memory[name] for name in PAGED)
        if self._pages(parameter):
            moments = self.pager.take(parameter, moments, parameter.device)
        first, second = moments
        adamw(
            [parameter], [parameter.grad], [first], [second], [], [memory["step"]],
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"], foreach=group["foreach"],
        )  # fmt: skip

    def _pages(self, parameter: Tensor) -> bool:
        return parameter.device.type != "cpu"


def _bytes(tensors: Pages) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
