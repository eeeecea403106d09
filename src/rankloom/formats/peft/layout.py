"""How PEFT stores the factor pair of each kind of place. Ours is always A (…, r, in), B (…, out, r)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rankloom.core.site import Site
from rankloom.errors import FileError

Map = Callable[[Tensor], Tensor]
CONVS = frozenset({"conv1d", "conv2d", "conv3d"})
LINEAR_A, LINEAR_B = "lora_A.weight", "lora_B.weight"


class Factor(NamedTuple):
    """One factor in the file: its key, which of ours it holds, and the map there and back."""

    key: str
    ours: Literal["A", "B"]
    out: Map
    back: Map


def factors(site: Site) -> tuple[Factor, Factor]:
    """The two factors of one place, as PEFT stores them for its kind."""
    return LAYOUTS[site.kind.name](site)


def magnitude_shape(site: Site, size: int) -> tuple[int, ...]:
    """DoRA's magnitude in the file: (out), for a convolution (1, out, 1 …)."""
    if site.kind.name in CONVS:
        return (1, size, *(1,) * (len(site.weight_shape) - 2))
    return (size,)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _linear(site: Site) -> tuple[Factor, Factor]:
    return Factor(LINEAR_A, "A", _same, _same), Factor(LINEAR_B, "B", _same, _same)


def _embedding(site: Site) -> tuple[Factor, Factor]:
    return Factor("lora_embedding_A", "A", _same, _same), Factor("lora_embedding_B", "B", _same, _same)


def _conv(site: Site) -> tuple[Factor, Factor]:
    kernel, count = site.weight_shape[1:], site.groups
    ones = (1,) * (len(kernel) - 1)

    def out(a: Tensor) -> Tensor:
        return _block_diagonal(a.reshape(-1, *kernel), count)

    def back(a: Tensor) -> Tensor:
        return _blocks(a, count, site.name).flatten(1)

    up = Factor(LINEAR_B, "B", lambda b: b.reshape(*b.shape, *ones), lambda b: b.flatten(1))
    return Factor(LINEAR_A, "A", out, back), up


def _block_diagonal(a: Tensor, count: int) -> Tensor:
    """(r, in/groups, k…) applied to every group → (groups·r, in, k…) with each group's rows on its own inputs."""
    if count == 1:
        return a
    r, inputs = a.shape[:2]
    wide = a.new_zeros(count, r, count, inputs, *a.shape[2:])
    for group in range(count):
        wide[group, :, group] = a
    return wide.reshape(count * r, count * inputs, *a.shape[2:])


def _blocks(a: Tensor, count: int, site: str) -> Tensor:
    if count == 1:
        return a
    wide = a.reshape(count, a.shape[0] // count, count, a.shape[1] // count, *a.shape[2:])
    if not torch.equal(_block_diagonal(wide[0, :, 0], count), a):
        raise FileError(
            f"{site}.{LINEAR_A}: a grouped convolution whose down projection mixes its {count} groups: "
            "ours applies the same rows to every group and cannot hold it; merge it with PEFT instead"
        )
    return wide[0, :, 0]


def _parameter(site: Site) -> tuple[Factor, Factor]:
    """[E, out, in]: A is flat with the expert slowest, B with the expert fastest; transposed experts swap the roles."""
    if len(site.shape) == 2:
        return _linear(site)
    experts = site.shape[0]

    def rows_out(t: Tensor) -> Tensor:
        return t.flatten(0, 1)

    def rows_back(t: Tensor) -> Tensor:
        return t.reshape(experts, -1, t.shape[-1])

    def cols_out(t: Tensor) -> Tensor:
        return t.permute(1, 2, 0).flatten(1)

    def cols_back(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], -1, experts).permute(2, 0, 1)

    if not transposed(site.layer):
        return Factor(LINEAR_A, "A", rows_out, rows_back), Factor(LINEAR_B, "B", cols_out, cols_back)
    down = Factor(LINEAR_A, "B", lambda t: rows_out(t.mT), lambda t: rows_back(t).mT)
    return down, Factor(LINEAR_B, "A", lambda t: cols_out(t.mT), lambda t: cols_back(t).mT)


def transposed(layer: nn.Module) -> bool:
    """Whether a module keeps its experts as [E, in, out]; PEFT looks at the same attribute."""
    return bool(getattr(layer, "is_transposed", False))


LAYOUTS: dict[str, Callable[[Site], tuple[Factor, Factor]]] = {
    "conv1d": _conv,
    "conv1d_transposed": _linear,
    "conv2d": _conv,
    "conv3d": _conv,
    "embedding": _embedding,
    "linear": _linear,
    "parameter": _parameter,
}
