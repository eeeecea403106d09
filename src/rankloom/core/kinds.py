"""Kinds: how a family of layers applies a matrix.

A method is written once, on the last two dims (out, in) of a matrix; the kind translates. All kinds are stateless.
For every kind and every factor pair:  apply(x, up·down) == up(down(x)), so a factored change never builds its matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.store.base import dense
from rankloom.store.bridges import eightbit, fourbit


class Kind(ABC):
    """How one family of layers holds and applies its (…, out, in) matrix."""

    name: str
    linear: bool = False
    repairs: tuple[type[nn.Module], ...] = ()
    """Mixins before a grafted layer's own class, where its forward does not always say what `weight` holds."""

    def tensor(self, layer: nn.Module) -> Tensor:
        """The raw base parameter, of the layer's own shape; read it through `matrix`."""
        weight = layer._parameters["weight"]
        assert weight is not None
        return weight

    def parameter(self) -> str:
        """Name of the parameter that a merge replaces."""
        return "weight"

    def weight(self, layer: nn.Module) -> Tensor:
        """The base parameter, dense, of the layer's own shape."""
        return dense(self.tensor(layer))

    def plain(self, layer: nn.Module) -> type[nn.Module] | None:
        """The class that the layer needs once its parameter is a plain one; None: its own will do."""
        return None

    def normalise(self, layer: nn.Module) -> None:  # noqa: B027
        """Have the parameter alone say what the base is, in every forward to come; done again when it is replaced."""

    def release(self, layer: nn.Module) -> None:  # noqa: B027
        """Undo what `normalise` forbids."""

    @abstractmethod
    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        """Shape (…, out, in) of the matrix."""

    @abstractmethod
    def matrix(self, layer: nn.Module) -> Tensor:
        """The base matrix (…, out, in), dense."""

    @abstractmethod
    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        """A matrix (…, out, in) in the layout of the layer's own parameter."""

    def bias(self, layer: nn.Module) -> Tensor | None:
        """The bias (out,) that the layer's own forward reads, if any."""
        own = getattr(type(layer), "rankloom_bias", None)
        return getattr(layer, "bias", None) if own is None else own(layer)

    @abstractmethod
    def down(self, layer: nn.Module, x: Any, a: Tensor) -> Tensor:
        """Apply a (r, in) matrix the way the layer applies its own, giving r channels."""

    @abstractmethod
    def up(self, layer: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        """Apply a (out, r) matrix to the r channels that `down` gave."""

    @abstractmethod
    def scale(self, y: Tensor, v: Tensor) -> Tensor:
        """Multiply the channels of a layer output, or of what `down` gave, by a vector (channels,); by one for each
        batch row, v (rows, channels) as `by_row` shapes it; of a linear layer also by token.
        """

    @abstractmethod
    def apply(self, layer: nn.Module, x: Any, matrix: Tensor) -> Tensor:
        """Apply a full (out, in) matrix, without bias."""

    def shift(self, y: Tensor, v: Tensor) -> Tensor:
        """`v` (out,) shaped so that it adds to the channels of `y`."""
        return v

    def by_row(self, x: Any, v: Tensor) -> Tensor:
        """`v` (rows, channels), one for each batch row, shaped to scale what the layer makes of its input `x`."""
        return v.reshape(v.shape[0], *(1,) * (x.ndim - 2), v.shape[1])

    def looked_up(self, layer: nn.Module, rows: Tensor) -> Tensor:
        """Rows of a table (…, dim) as the layer gives them; only embeddings have any."""
        return rows

    def groups(self, layer: nn.Module) -> int:
        """How many blocks of channels the layer keeps apart; the matrix's columns are those of one block."""
        return 1

    def example(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A small input of the layer."""
        return torch.linspace(-1, 1, 2 * self.shape(layer)[-1], dtype=dtype, device=device).view(2, -1)


class Dense(Kind):
    """`nn.Linear`: y = x Wᵀ."""

    name = "linear"
    linear = True

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]

    def read(self, weight: Tensor) -> Tensor:
        """The matrix (out, in) that the raw parameter holds, dense."""
        return dense(weight)

    def matrix(self, layer: nn.Module) -> Tensor:
        return self.weight(layer)

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix

    def down(self, layer: nn.Module, x: Any, a: Tensor) -> Tensor:
        return F.linear(x, a)

    def up(self, layer: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b)

    def scale(self, y: Tensor, v: Tensor) -> Tensor:
        return y * v

    def apply(self, layer: nn.Module, x: Any, matrix: Tensor) -> Tensor:
        return F.linear(x, matrix)


class Bitsandbytes(Dense):
    """A linear layer whose weight bitsandbytes keeps in 4 or 8 bits, part of it beside the parameter."""

    def plain(self, layer: nn.Module) -> type[nn.Module] | None:
        return nn.Linear


class FourBit(Bitsandbytes):
    """`Linear4bit`."""

    repairs = (fourbit.ByCodes,)

    def weight(self, layer: nn.Module) -> Tensor:
        return super().weight(layer) if self.tensor(layer).is_floating_point() else fourbit.weight_of(layer)

    def normalise(self, layer: nn.Module) -> None:
        fourbit.normalise(layer)

    def release(self, layer: nn.Module) -> None:
        fourbit.release(layer)


class EightBit(Bitsandbytes):
    """`Linear8bitLt`."""

    def weight(self, layer: nn.Module) -> Tensor:
        return super().weight(layer) if self.tensor(layer).is_floating_point() else eightbit.weight_of(layer)

    def normalise(self, layer: nn.Module) -> None:
        eightbit.normalise(layer)


class TransposedDense(Dense):
    """transformers' `Conv1D` (GPT-2): the weight is stored (in, out)."""

    name = "conv1d_transposed"

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        rows, cols = self.tensor(layer).shape
        return int(cols), int(rows)

    def matrix(self, layer: nn.Module) -> Tensor:
        return self.weight(layer).T

    def read(self, weight: Tensor) -> Tensor:
        return dense(weight).T

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()


class Lookup(Dense):
    """`nn.Embedding`: the matrix (dim, vocabulary) is the transposed table; x holds token ids."""

    name = "embedding"
    linear = False

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return int(layer.embedding_dim), int(layer.num_embeddings)  # type: ignore[arg-type]

    def matrix(self, layer: nn.Module) -> Tensor:
        return self.weight(layer).T

    def read(self, weight: Tensor) -> Tensor:
        return dense(weight).T

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous()

    def down(self, layer: nn.Module, x: Any, a: Tensor) -> Tensor:
        padding: int | None = layer.padding_idx  # type: ignore[assignment]
        return self.looked_up(layer, F.embedding(x, a.T, padding))  # no gradient at the padding row, as in the layer

    def by_row(self, x: Any, v: Tensor) -> Tensor:
        return v.reshape(v.shape[0], *(1,) * (x.ndim - 1), v.shape[1])

    def example(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.arange(min(3, self.shape(layer)[-1]), device=device)[None]

    def looked_up(self, layer: nn.Module, rows: Tensor) -> Tensor:
        factor = getattr(layer, "embed_scale", None)  # scaled embeddings (Gemma-type) multiply what they look up
        return rows if factor is None else rows * torch.as_tensor(factor).to(rows)

    def apply(self, layer: nn.Module, x: Any, matrix: Tensor) -> Tensor:
        return self.down(layer, x, matrix)


class Convolution(Kind):
    """`nn.Conv1d/2d/3d`: the matrix is the kernel flattened to (out, in/groups · k…).

    Groups: `down` applies the same rows to every group's input and gives groups·r channels; `up` mixes within groups.
    """

    name = "conv"

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        weight = self.tensor(layer)
        return int(weight.shape[0]), math.prod(weight.shape[1:])

    def matrix(self, layer: nn.Module) -> Tensor:
        return self.weight(layer).flatten(1)

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.tensor(layer).shape)

    def down(self, layer: nn.Module, x: Any, a: Tensor) -> Tensor:
        kernel = a.reshape(-1, *self.tensor(layer).shape[1:])
        groups = self.groups(layer)
        kernel = kernel if groups == 1 else kernel.repeat(groups, *(1,) * (kernel.ndim - 1))
        out: Tensor = layer._conv_forward(x, kernel, None)  # type: ignore[operator]
        return out

    def up(self, layer: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        rank = self.tensor(layer).ndim - 2
        convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        return convolve(h, b.reshape(*b.shape, *(1,) * rank), groups=self.groups(layer))

    def groups(self, layer: nn.Module) -> int:
        return int(layer.groups)  # type: ignore[arg-type]

    def example(self, layer: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
        reach = [(k - 1) * d + 2 for k, d in zip(layer.kernel_size, layer.dilation)]  # type: ignore[arg-type]
        shape = (1, int(layer.in_channels), *reach)  # type: ignore[arg-type]
        return torch.linspace(-1, 1, math.prod(shape), dtype=dtype, device=device).view(shape)

    def scale(self, y: Tensor, v: Tensor) -> Tensor:
        copies = y.shape[self._channel_axis(y)] // v.shape[-1]
        return y * self.shift(y, v if copies == 1 else v.repeat(*(1,) * (v.ndim - 1), copies))

    def shift(self, y: Tensor, v: Tensor) -> Tensor:
        return v.reshape(*v.shape, *(1,) * self._spatial)

    def by_row(self, x: Any, v: Tensor) -> Tensor:
        return v

    def apply(self, layer: nn.Module, x: Any, matrix: Tensor) -> Tensor:
        out: Tensor = layer._conv_forward(x, self.to_weight(layer, matrix), None)  # type: ignore[operator]
        return out

    def _channel_axis(self, y: Tensor) -> int:
        return y.ndim - self._spatial - 1

    _spatial: int


class Convolution1d(Convolution):
    """`nn.Conv1d`."""

    name = "conv1d"
    _spatial = 1


class Convolution2d(Convolution):
    """`nn.Conv2d`."""

    name = "conv2d"
    _spatial = 2


class Convolution3d(Convolution):
    """`nn.Conv3d`."""

    name = "conv3d"
    _spatial = 3


class Bare(Kind):
    """A parameter or buffer without a layer to call: its "output" is the tensor itself.

    A change of the output *is* a change of the matrix: down(A) = A, up(h, B) = B h, apply(ΔW) = ΔW. Leading dims
    (stacked experts [E, out, in]) are carried along.
    """

    name = "parameter"

    def __init__(self, key: str) -> None:
        self.key = key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bare) and other.key == self.key

    def __hash__(self) -> int:
        return hash(("Bare", self.key))

    def tensor(self, layer: nn.Module) -> Tensor:
        value: Tensor | None = layer._parameters.get(self.key)
        value = layer._buffers.get(self.key) if value is None else value
        assert value is not None
        return value

    def parameter(self) -> str:
        return self.key

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return tuple(self.tensor(layer).shape)

    def matrix(self, layer: nn.Module) -> Tensor:
        return self.weight(layer)

    def to_weight(self, layer: nn.Module, matrix: Tensor) -> Tensor:
        return matrix

    def bias(self, layer: nn.Module) -> Tensor | None:
        return None

    def down(self, layer: nn.Module, x: Any, a: Tensor) -> Tensor:
        return a

    def up(self, layer: nn.Module, h: Tensor, b: Tensor) -> Tensor:
        return b @ h

    def scale(self, y: Tensor, v: Tensor) -> Tensor:
        return y * v[..., None]

    def apply(self, layer: nn.Module, x: Any, matrix: Tensor) -> Tensor:
        return matrix


KINDS: dict[str, Kind] = {
    "bitsandbytes.nn.modules.Linear4bit": FourBit(),
    "bitsandbytes.nn.modules.Linear8bitLt": EightBit(),
    "torch.nn.modules.conv.Conv1d": Convolution1d(),
    "torch.nn.modules.conv.Conv2d": Convolution2d(),
    "torch.nn.modules.conv.Conv3d": Convolution3d(),
    "torch.nn.modules.linear.Linear": Dense(),
    "torch.nn.modules.sparse.Embedding": Lookup(),
    "transformers.pytorch_utils.Conv1D": TransposedDense(),
}


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of `layer`, by class name along its bases (so no model library is imported); None if it has none."""
    return _first_kind(type(layer))


def repairs_of(original: type[nn.Module]) -> tuple[type[nn.Module], ...]:
    """The mixins that the layers of a class need once they are adapted."""
    kind = _first_kind(original)
    return () if kind is None else kind.repairs


def is_kind(cls: type) -> bool:
    """Whether a kind is known for this very class."""
    return _kind(cls) is not None


def product(original: type[nn.Module]) -> Dense | None:
    """The kind of a class whose forward is nothing but the product with its matrix, plus its bias; else None."""
    kind = _kind(next(cls for cls in original.__mro__ if "forward" in vars(cls)))
    return kind if isinstance(kind, Dense) and kind.linear else None


def _first_kind(layer: type) -> Kind | None:
    return next((kind for cls in layer.__mro__ if (kind := _kind(cls)) is not None), None)


def _kind(cls: type) -> Kind | None:
    return KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
