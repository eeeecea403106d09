"""The base: what an adapter may ask of the frozen layer that it changes, in one forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from rankloom.core.kinds import Kind
from rankloom.core.notes import Notes

_EMPTY: Mapping[str, Any] = MappingProxyType({})


class Base:
    """The frozen layer through its kind; `context`: what is known of the batch (task ids, attention mask); `rows`:
    numbers of the batch rows that the adapter sees (None: all); `noted`: whether the adapter had something to note.
    """

    __slots__ = ("context", "kind", "layer", "noted", "notes", "rows")

    def __init__(
        self,
        kind: Kind,
        layer: nn.Module,
        context: Mapping[str, Any] = _EMPTY,
        notes: Notes | None = None,
        rows: Tensor | None = None,
    ) -> None:
        self.kind = kind
        self.layer = layer
        self.context = context
        self.notes = notes
        self.rows = rows
        self.noted = False

    @property
    def name(self) -> str:
        """Of the site; looked up when it is asked for, as compiled code would be made again for every other name."""
        anchor = self.layer.__dict__.get("_rankloom")
        path = "" if anchor is None else anchor.name
        return path if self.kind.name != "parameter" else ".".join(filter(None, (path, self.kind.parameter())))

    def note(self, kind: str, tensor: Tensor) -> None:
        """Tell the rules of the training something of this forward pass (`Run.notes`); dropped if no rule reads it."""
        self.noted = True
        if self.notes is not None:
            self.notes.put(kind, self.name, tensor)

    def matrix(self) -> Tensor:
        """The base matrix (…, out, in), dense."""
        return self.kind.matrix(self.layer)

    def bias(self) -> Tensor | None:
        """The base bias (out,) or None."""
        return self.kind.bias(self.layer)

    def down(self, x: Any, a: Tensor) -> Tensor:
        """x through a (r, in) matrix."""
        return self.kind.down(self.layer, x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """What `down` gave through a (out, r) matrix."""
        return self.kind.up(self.layer, h, b)

    def scale(self, y: Tensor, v: Tensor) -> Tensor:
        """Channels of y times v; of a linear layer also by token, v (…, channels)."""
        return self.kind.scale(y, v)

    def shift(self, y: Tensor, v: Tensor) -> Tensor:
        """v shaped to add to the channels of y."""
        return self.kind.shift(y, v)

    def unbiased(self, y: Tensor) -> Tensor:
        """The base output without the bias: W x."""
        bias = self.bias()
        return y if bias is None else y - self.shift(y, bias.to(y.dtype))

    def apply(self, x: Any, matrix: Tensor) -> Tensor:
        """x through a full (out, in) matrix."""
        return self.kind.apply(self.layer, x, matrix)
