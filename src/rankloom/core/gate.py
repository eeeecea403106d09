"""A gate: which of n experts (or adapters) act, and how much: by layer, block, batch row, token or task.

A gate is frozen settings; `build` makes its router for one site. Whoever has one weight for all tokens can be merged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from rankloom.core.base import Base
from rankloom.core.method import together
from rankloom.core.shared import Borrower
from rankloom.core.site import Site
from rankloom.errors import NotMergeable, StateError
from rankloom.settings import Settings

Source = Literal["layer", "block", "first_pass", "task", "cluster", "sequence"]


class Router(Borrower, ABC):
    """The gate of one site, called ``router(x, base) -> weights (…, n)``, float32.

    x (…, in) is the layer's input, None where there is none (a matrix is asked for): a router that needs it, or a
    column of `base.context` that is not there, then raises `NotMergeable`. The leading dims of the weights are those of
    x (by token), (rows,), or none. `top`: how many weights of a token can be other than 0; None: all of them.
    """

    top: int | None = None

    def __init__(self, site: Site, n: int) -> None:
        super().__init__()
        self.site_name = site.name
        self.n = n

    def reset(self) -> None:
        """Fill the parameters."""

    @abstractmethod
    def forward(self, x: Any, base: Base) -> Tensor: ...

    def no_matrix(self, why: str) -> NotMergeable:
        """The refusal of a matrix."""
        who = f"the {type(self).__name__} at {self.site_name!r}"
        return NotMergeable(f"{who} {why}: there is no single matrix to merge")

    def column(self, base: Base, name: str, x: Any) -> Any:
        """A column of the context, of the batch rows that are seen here. Raises `StateError` if it is not there."""
        if name not in base.context:
            if x is None:
                raise self.no_matrix(f"needs to know {name!r}, as in merge(…, context={{{name!r}: 0}})")
            raise StateError(
                f"the gate at {self.site_name!r} needs the column {name!r} of the batch: "
                f"fit(context=({name!r},)) hands it on, and so does bank.using(…, context={{{name!r}: …}})"
            )
        found = base.context[name]
        if isinstance(found, Tensor) and found.ndim:
            return found if base.rows is None or x is None else found[base.rows.to(found.device)]
        return found


def rows_of(value: Tensor, x: Tensor, site_name: str) -> Tensor:
    """`value` (rows, …), one for each batch row, for the rows of x: repeated where a row of the batch has several."""
    times, left = divmod(x.shape[0], value.shape[0])
    if times == 1 and not left:
        return value
    if left or x.ndim < 2:
        raise StateError(
            f"the gate at {site_name!r} knows {value.shape[0]} batch rows, the layer sees {x.shape[0]}; this layer "
            "does not keep batch rows apart (flattened or routed tokens): give the gate one value for all rows"
        )
    return value.repeat_interleave(times, dim=0)


@dataclass(frozen=True)
class Gate(Settings, ABC):
    """Settings of a gate. `source`: what it looks at; `constant`: a row has the same weights for all its tokens, so the
    layer's input is not needed.
    """

    source: ClassVar[Source] = "layer"

    @property
    def constant(self) -> bool:
        """Whether a row has one weight for all its tokens."""
        return False

    @abstractmethod
    def build(self, site: Site, n: int) -> Router:
        """The router of one site over n experts; values are filled by `Router.reset`."""

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """Hooks that the routers need, once they are in the model; returns the undo (picklable)."""
        return together(())


def spread(weights: Tensor, x: Any, base: Base) -> Tensor:
    """Weights (rows, n), given for whole rows, in a shape that goes with the tokens of x; others as they are."""
    return base.kind.by_row(x, weights) if weights.ndim == 2 and isinstance(x, Tensor) else weights
