"""The bank as rules and starts see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from rankloom.core.adapter import Adapter
from rankloom.core.choosing import Rows
from rankloom.core.moments import Forget
from rankloom.core.selection import Weight
from rankloom.core.shared import Shared
from rankloom.core.site import Site


class BankView(Protocol):
    """What a training rule or a start may ask of `Bank`, which says what each does."""

    model: nn.Module
    plans: dict[str, Any]

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def active(self) -> dict[str, Weight]: ...

    @property
    def trained(self) -> tuple[str, ...]: ...

    def sites(self, name: str) -> list[Site]: ...

    def adapters(self, name: str | None = None, of: type[Adapter] | None = None) -> Iterator[tuple[str, Adapter]]: ...

    def tensors(self, name: str) -> Iterator[tuple[str, nn.Parameter, str]]: ...

    def trainable(self, *names: str) -> Iterator[tuple[str, nn.Parameter, str]]: ...

    def shared_of(self, name: str) -> Shared: ...

    def reset(self, name: str) -> None: ...

    def fold(
        self,
        *names: str,
        into: Literal["dense", "store"] = "store",
        sign: float = 1.0,
        context: Mapping[str, Any] | None = None,
        **weights: float,
    ) -> dict[str, float]: ...

    def restart(
        self,
        name: str,
        optimizer: Optimizer | None = None,
        *,
        moments: Forget | None = None,
        into: Literal["dense", "store"] = "store",
    ) -> dict[str, float]: ...

    def using(
        self,
        *names: str,
        rows: Rows | None = None,
        context: Mapping[str, Any] | None = None,
        **weights: Weight,
    ) -> AbstractContextManager[Any]: ...

    def delta(self, name: str, context: Mapping[str, Any] | None = None) -> dict[str, Tensor]: ...
