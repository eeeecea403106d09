"""A frozen weight kept in fewer bits, and the one way to read it.

`Packed` is a tensor of the logical shape and dtype that holds only its parts (codes, scales, zero points). It moves,
copies, saves and shards by its parts; a linear layer unpacks it for the product and keeps the packed form for backward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankloom.errors import StateError
from rankloom.ops.autocast import autocasts
from rankloom.settings import Settings, Where
from rankloom.store.bridges import bridge_of

aten = torch.ops.aten
Parts = dict[str, Tensor]
Bits = Annotated[int, Where("one of 2, 3, 4, 8", (2, 3, 4, 8).__contains__)]
"""Widths of a code."""


class Keeping(Settings, ABC):
    """What decides how each weight of a model is kept: one store for all of them, or a choice."""

    @abstractmethod
    def choose(self, weights: Mapping[str, Tensor], fisher: Mapping[str, Tensor], r: int) -> Mapping[str, Store]:
        """The store of each weight (out, in). `fisher`: information of the same shapes where it is known; `r`: rank of
        what an adapter will take off each weight.
        """


@dataclass(frozen=True)
class Store(Keeping):
    """How a weight is kept: two pure functions and their settings."""

    def choose(self, weights: Mapping[str, Tensor], fisher: Mapping[str, Tensor], r: int) -> Mapping[str, Store]:
        """This store for every weight."""
        return dict.fromkeys(weights, self)

    @abstractmethod
    def encode(self, weight: Tensor) -> Parts:
        """The parts of a dense (out, in) weight, computed in float32."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The dense weight of `shape` and `dtype` behind the parts."""

    def grain(self) -> Mapping[str, tuple[int, int]] | None:
        """(weights, entries) of each part: so many entries in a row hold so many weights in a row, and (0, 0) is for
        all weights; None: a weight in this store is never cut.
        """
        return None

    @abstractmethod
    def bits_per_weight(self) -> float:
        """Bits for one weight, scales included, of a matrix without padding."""

    def product(self, x: Tensor, parts: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
        """x (…, in) Wᵀ without a dense W, where a kernel has it; else None."""
        return None

    def pack(self, weight: Tensor) -> Packed:
        """`weight` kept in this store; its dtype stays the logical dtype."""
        return Packed(self.encode(weight.detach()), self, weight.shape, weight.dtype)

    def cut(self, parts: Mapping[str, Tensor], start: int, stop: int, last: bool) -> Parts | None:
        """The parts of the weights from `start` to `stop` (row-major, `last`: to the end); None within a block."""
        grain, found = self.grain(), Parts()
        if grain is None:
            return None
        for name, (weights, entries) in grain.items():
            if not weights:
                found[name] = parts[name]
                continue
            if start % weights or (stop % weights and not last):
                return None
            end = None if last else stop // weights * entries
            piece = parts[name].flatten()[start // weights * entries : end]
            found[name] = piece.reshape(-1, *parts[name].shape[1:])
        return found

    def round_trip(self, weight: Tensor) -> Tensor:
        """What is left of `weight` after packing: decode(encode(weight))."""
        return self.decode(self.encode(weight.detach()), weight.shape, weight.dtype)


class Packed(torch.Tensor):
    """A weight held as the parts of a store; every other operation than those below unpacks it first."""

    store: Store
    part_names: tuple[str, ...]

    @staticmethod
    def __new__(cls, parts: Parts, store: Store, shape: torch.Size, dtype: torch.dtype) -> Packed:
        device = next(iter(parts.values())).device
        made: Packed = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        return made

    def __init__(self, parts: Parts, store: Store, shape: torch.Size, dtype: torch.dtype) -> None:
        self.store = store
        self.part_names = tuple(parts)
        for name, part in parts.items():
            setattr(self, f"part_{name}", part)

    @property
    def parts(self) -> Parts:
        """The stored tensors by name."""
        return {name: getattr(self, f"part_{name}") for name in self.part_names}

    def unpack(self) -> Tensor:
        """The dense weight."""
        return self.store.decode(self.parts, self.shape, self.dtype)

    def repack(self, weight: Tensor) -> Packed:
        """A dense weight of the same shape, kept the same way."""
        return self.store.pack(weight.to(self.dtype))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(p.numel() * p.element_size() for p in self.parts.values())

    def with_parts(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> Packed:
        """The same weight with every part changed (moved, cloned)."""
        return Packed({n: change(p) for n, p in self.parts.items()}, self.store, self.shape, dtype or self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Packed({self.store}, shape={tuple(self.shape)}, dtype={self.dtype}, bytes={self.stored_bytes})"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Store, tuple[str, ...], torch.dtype]]:
        return [f"part_{n}" for n in self.part_names], (self.store, self.part_names, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], meta: Any, size: torch.Size, stride: Any) -> Packed:
        store, names, dtype = meta
        return Packed({n: inner[f"part_{n}"] for n in names}, store, size, dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.parts, self.store, self.shape, self.dtype, bool(getattr(self, "_is_param", False)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.with_parts(lambda p: p.detach().clone())
            memo[id(self)] = (
                torch.nn.Parameter(copied, requires_grad=False) if getattr(self, "_is_param", False) else copied
            )
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        own = _OPS.get(func.overloadpacket)
        if own is not None:
            return own(*args, **(kwargs or {}))
        if func._schema.is_mutable and isinstance(args[0], Packed):
            raise StateError(
                f"{func} would write into a packed weight ({args[0].store}); unpack it first, or repack a new one"
            )
        return func(*_unpacked(args), **{k: _unpacked(v) for k, v in (kwargs or {}).items()})


def _rebuild(parts: Parts, store: Store, shape: torch.Size, dtype: torch.dtype, parameter: bool) -> Tensor:
    made = Packed(parts, store, shape, dtype)
    return torch.nn.Parameter(made, requires_grad=False) if parameter else made


def _unpacked(value: Any) -> Any:
    if isinstance(value, Packed):
        return value.unpack()
    if isinstance(value, (list, tuple)):
        return type(value)(_unpacked(v) for v in value)
    return value


def _to_copy(w: Packed, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Packed:
    keep = {k: v for k, v in rest.items() if k == "non_blocking"}
    return w.with_parts(lambda p: p.to(device=device, **keep), dtype)


def _empty_like(w: Packed, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Packed:
    return w.with_parts(lambda p: torch.empty_like(p, device=device), dtype)


def _copy(w: Packed, source: Tensor, *_: Any) -> Packed:
    if not isinstance(source, Packed) and torch.equal(source.to(w.device, w.dtype), w.unpack()):
        return w  # packing once more would not find the same codes
    new = source if isinstance(source, Packed) and source.store == w.store else w.repack(_unpacked(source))
    for name, part in w.parts.items():
        part.copy_(new.parts[name])
    return w


def _split(w: Packed, size: int | list[int], dim: int = 0) -> list[Tensor]:
    """Packed pieces of whole rows and whole blocks; nothing else, as a dense piece would be a silent unpacking."""
    sizes = [min(size, w.shape[0] - i) for i in range(0, w.shape[0], size)] if isinstance(size, int) else size
    columns, made, row = w.shape[1:].numel(), list[Tensor](), 0
    for rows in sizes:
        parts = None
        if dim in (0, -w.ndim):
            parts = w.store.cut(w.parts, row * columns, (row + rows) * columns, row + rows == w.shape[0])
        if parts is None:
            raise StateError(
                f"a packed weight {tuple(w.shape)} ({w.store}) splits along dim 0 between blocks, not into pieces of "
                f"{rows} along dim {dim}: unpack it first (store.dense), or split at other rows"
            )
        made.append(Packed(parts, w.store, torch.Size((rows, *w.shape[1:])), w.dtype))
        row += rows
    return made


_OPS: dict[Any, Callable[..., Any]] = {
    aten.detach: lambda w: w.with_parts(torch.Tensor.detach),
    aten.alias: lambda w: w.with_parts(torch.Tensor.detach),
    aten.clone: lambda w, **_: w.with_parts(torch.clone),
    aten._to_copy: _to_copy,
    aten.copy_: _copy,
    aten.empty_like: _empty_like,
    aten.split: _split,
    aten.split_with_sizes: _split,
}


class _Product(torch.autograd.Function):
    """y = x Wᵀ with W unpacked for the product only: backward unpacks it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Packed) -> Tensor:
        ctx.weight = weight
        made = weight.store.product(x, weight.parts, weight.shape)
        return F.linear(x, weight.unpack().to(x.dtype)) if made is None else made

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy @ ctx.weight.unpack().to(dy.dtype), None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Packed):
        return F.linear(_unpacked(x), weight, _unpacked(bias))
    if autocasts(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _Product.apply(x, weight)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)


def is_plain(weight: Tensor) -> bool:
    """Whether its elements are the numbers themselves, in 16 bits or more."""
    ours = type(weight) in (Tensor, torch.nn.Parameter) or bridge_of(weight) is None
    return ours and weight.is_floating_point() and weight.element_size() >= 2


def stored_tensors(weight: Tensor) -> list[Tensor]:
    """What is held for a weight: the parts of a store, codes (first) and scales of another library, or the weight."""
    if isinstance(weight, Packed):
        return list(weight.parts.values())
    bridge = bridge_of(weight)
    return [weight.detach()] if bridge is None else bridge.stored(weight)


def dense(weight: Tensor) -> Tensor:
    """The plain floating-point tensor behind `weight`, of the weight's logical shape.

    A plain floating tensor is returned as it is. Raises `StateError` for a weight that no store of ours and no bridge
    can read.
    """
    if type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.element_size() >= 2:
        return weight
    if isinstance(weight, Packed):
        return weight.unpack()
    bridge = None if type(weight) in (Tensor, torch.nn.Parameter) else bridge_of(weight)
    if bridge is not None:
        return bridge.read(weight)
    if not is_plain(weight):
        raise StateError(
            f"a base weight of type {type(weight).__name__} and dtype {weight.dtype} cannot be read as numbers: "
            "load the base model in float32, bfloat16 or float16, or pack it with a store"
        )
    return weight if type(weight) in (Tensor, torch.nn.Parameter) else weight.as_subclass(torch.Tensor)
