"""The gate of a block: scores of what a transformer block (or the module around a layer) is given, token by token,
shared by the projections inside.

LoRA-Flow, arXiv 2402.11455: softmax(W x/τ) + c on the block's input, c outside of the softmax. LLaVA-MoLE,
arXiv 2401.16160: softmax(W x + b) on the input of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from rankloom.core.base import Base
from rankloom.core.gate import Gate, Router, Source
from rankloom.core.site import Site
from rankloom.core.taps import tap, tapped
from rankloom.errors import SettingsError, StateError, TargetError
from rankloom.gates.scores import Bias, Scores, check_temperature


@dataclass(frozen=True)
class Block(Gate):
    """`at`: the input of the whole "block", or of the module that owns the layer ("parent", such as the MLP); `bias`:
    "none", "inside" the softmax or "outside"; `start`: the expert that an outside bias takes at first; `std` of W's
    normal start (None: uniform within 1/√width); `temperature` τ.
    """

    source: ClassVar[Source] = "block"
    at: Literal["block", "parent"] = "block"
    bias: Bias = "none"
    start: int | None = None
    std: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.start is not None and self.bias != "outside":
            raise SettingsError(f"start={self.start} is the start of an outside bias, and bias={self.bias!r}")

    def build(self, site: Site, n: int) -> Router:
        """The site's view of its block's router; the first site of a block makes it."""
        if self.start is not None and not -n <= self.start < n:
            raise SettingsError(f"start={self.start}: {site.name!r} has {n} experts, from 0 to {n - 1}")
        if site.block_path is None or site.slot != "layer":
            raise TargetError(f"block gate: site {site.name!r} is a {site.kind.name} outside of the model's blocks")
        if site.hidden is None:
            raise TargetError(
                f"block gate: at {site.name!r} the width of hidden states is unknown: the model has neither a "
                "config.hidden_size nor get_output_embeddings()"
            )
        path = site.block_path if self.at == "block" else site.path.rpartition(".")[0]
        return BlockRouter(site, n, self, path)

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """Tap every block that a router of this kind looks at."""
        return tap(model, dict.fromkeys(m.path for m in model.modules() if isinstance(m, BlockRouter)))


class BlockRouter(Router):
    """Borrows `scores` of the module `path`; computed once for all layers inside of it."""

    def __init__(self, site: Site, n: int, gate: Block, path: str) -> None:
        super().__init__(site, n)
        self.path = path
        key = f"router_{path}".replace(".", "_")
        assert site.hidden is not None
        width = site.hidden
        make = lambda: Scores(site, n, width, gate.bias, gate.std, gate.temperature, gate.start)  # noqa: E731
        made = site.shared.module(key, make)
        if made.weight.shape[0] != n:
            raise SettingsError(
                f"{site.name!r} has {n} experts, and {made.weight.shape[0]} are routed together at {path!r}"
            )
        self.borrow(site.shared, scores=key)

    def reset(self) -> None:
        self.scores.reset()

    def forward(self, x: Any, base: Base) -> Tensor:
        if x is None:
            found = self.scores.blind()
            if found is None:
                raise self.no_matrix(f"depends on the input of {self.path!r}")
            return found[0]  # type: ignore[no-any-return]
        seen = tapped(self.path)
        if seen is None:
            raise StateError(
                f"the gate at {self.site_name!r} looks at the input of {self.path!r}, which is not running: call the "
                "model, or that module, not the layer alone"
            )
        weights = seen.once(id(self.scores), lambda value: self._scored(value, base))
        weights = weights if base.rows is None else weights[base.rows]
        if weights.shape[:-1] != x.shape[:-1]:
            raise StateError(
                f"the gate at {self.site_name!r} weighs {tuple(weights.shape[:-1])} tokens of {self.path!r}, and the "
                f"layer sees {tuple(x.shape[:-1])}; this layer does not keep them apart (flattened or routed tokens)"
            )
        return weights

    def _scored(self, value: Tensor, base: Base) -> Tensor:
        weights, probabilities = self.scores(value)
        base.note("router", probabilities)
        return weights  # type: ignore[no-any-return]
