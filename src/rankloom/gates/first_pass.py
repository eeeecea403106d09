"""The gate of a first pass: a classifier of the hidden states that the base alone gives, token by token.

Before an active adapter's forward the base runs once without gradients; weights = softmax(C(h)/τ) of its last hidden
states h, C linear or an MLP. X-LoRA, Buehler & Buehler 2024, arXiv 2402.07148. Every forward costs two; in generation
the base keeps a cache of its own beside the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rankloom.core.base import Base
from rankloom.core.gate import Gate, Router, Source
from rankloom.core.method import together
from rankloom.core.pairing import beside, caches, pair
from rankloom.core.selection import BASE_ONLY, Selector
from rankloom.core.shared import Shared
from rankloom.core.site import Site
from rankloom.core.taps import Tap, close_tap, lasting_tap, open_tap, tapped
from rankloom.errors import SettingsError, StateError, TargetError
from rankloom.gates.scores import check_temperature
from rankloom.ops.autocast import own_precision

KEY = "first_pass"


@dataclass(frozen=True)
class FirstPass(Gate):
    """`depth` of the classifier, its inner layers of `size` with ReLU and `dropout`; `layerwise`: weights of its own
    for every site; `softmax` over the scores, or the scores themselves; `temperature` τ.
    """

    source: ClassVar[Source] = "first_pass"
    depth: int = 1
    size: int = 2048
    dropout: float = 0.2
    layerwise: bool = False
    softmax: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.depth < 1 or self.size < 1 or not 0 <= self.dropout < 1:
            raise SettingsError(f"depth={self.depth}, size={self.size}, dropout={self.dropout}: no such classifier")

    def build(self, site: Site, n: int) -> Router:
        """The site's view of the one classifier; the first site makes it."""
        if site.hidden is None:
            raise TargetError(
                f"first_pass gate: at {site.name!r} the width of hidden states is unknown: the model has neither a "
                "config.hidden_size nor get_output_embeddings()"
            )
        return FirstPassRouter(site, n, self)

    def patch(self, model: nn.Module) -> Callable[[], None]:
        """Let the base run before each forward in which an adapter with this gate is active."""
        inside = getattr(model, "base_model", model)
        inside = inside if isinstance(inside, nn.Module) else model
        bank: Any = model.rankloom
        passes = Passes(bank.selector, bank._shared)
        before = inside.register_forward_pre_hook(passes.before, with_kwargs=True)
        after = inside.register_forward_hook(passes.after, always_call=True)
        return together([before.remove, after.remove])


class Classifier(nn.Module):
    """`layers` on hidden states (…, width): scores (…, sites, n) in float32."""

    def __init__(self, site: Site, n: int, gate: FirstPass) -> None:
        super().__init__()
        self.sites, self.n = site.count if gate.layerwise else 1, n
        self.softmax, self.temperature = gate.softmax, gate.temperature
        assert site.hidden is not None
        widths = [site.hidden, *[gate.size] * (gate.depth - 1), self.sites * n]
        self.layers = nn.Sequential()
        for i, (in_, out) in enumerate(pairwise(widths)):
            if i:
                self.layers.extend([nn.ReLU(), nn.Dropout(gate.dropout)])
            self.layers.append(nn.Linear(in_, out, dtype=site.dtype, device=site.device))

    def reset(self) -> None:
        """Fill the layers."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        with own_precision(hidden):
            first = next(self.layers.parameters())
            scores: Tensor = self.layers(hidden.to(first.dtype)).float() / self.temperature
            scores = scores.reshape(*scores.shape[:-1], self.sites, self.n)
            return scores.softmax(-1) if self.softmax else scores


class FirstPassRouter(Router):
    """Borrows `classifier`; `index` of the site among its outputs."""

    def __init__(self, site: Site, n: int, gate: FirstPass) -> None:
        super().__init__(site, n)
        self.index = site.index if gate.layerwise else 0
        site.shared.module(KEY, lambda: Classifier(site, n, gate))
        self.borrow(site.shared, classifier=KEY)

    def reset(self) -> None:
        self.classifier.reset()

    def forward(self, x: Any, base: Base) -> Tensor:
        if x is None:
            raise self.no_matrix("depends on the hidden states of a first pass")
        seen = tapped(KEY) or lasting_tap(KEY)
        if seen is None:
            raise StateError(
                f"the gate at {self.site_name!r} looks at a first pass of the model, which is not running: call "
                "the model, not the layer alone"
            )
        weights = seen.known[id(self.classifier)][..., self.index, :]
        weights = weights if base.rows is None else weights[base.rows]
        if weights.shape[:-1] != x.shape[:-1]:
            raise StateError(
                f"the gate at {self.site_name!r} weighs {tuple(weights.shape[:-1])} tokens, and the layer sees "
                f"{tuple(x.shape[:-1])}; this layer does not keep them apart (flattened or routed tokens)"
            )
        base.note("router", weights)
        return weights


class Passes:
    """Hooks around the model's inside: the first pass, its cache, and the weights that come of it."""

    def __init__(self, selector: Selector, shared: dict[str, Shared]) -> None:
        self.selector = selector
        self.shared = shared

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the base alone, and classify what it gives."""
        classifiers = self._wanted()
        if not classifiers:
            return
        held = {name: beside(cache) for name, cache in caches(kwargs).items()}
        with torch.no_grad(), self.selector.local(BASE_ONLY):
            output = module(*args, **{**kwargs, **held})
        hidden = _hidden(output)
        tap = Tap(KEY, hidden, beside=None if held else _cache_in(output))
        for classifier in classifiers:
            width = classifier.layers[0].in_features
            if hidden.shape[-1] != width:
                raise StateError(
                    f"the first pass gives states of width {hidden.shape[-1]} and the classifier takes {width}: a "
                    "model whose base_model gives its last hidden states is needed"
                )
            tap.once(id(classifier), classifier)
        open_tap(tap, lasting=torch.is_grad_enabled())

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Let the caches go on together."""
        if not self._wanted():
            return
        tap = close_tap(KEY)
        made = _cache_in(output)
        if tap is not None and tap.beside is not None and made is not None:
            pair(made, tap.beside)

    def _wanted(self) -> list[Classifier]:
        """The classifiers of the adapters that are active."""
        own = (self.shared[a.name]._modules.get(KEY) for a in self.selector.current().active if a.name in self.shared)
        return [module for module in own if isinstance(module, Classifier)]


def _cache_in(output: Any) -> Any:
    """The cache that a pass made, None if it made none."""
    found = caches(output) if isinstance(output, Mapping) else {}
    return next(iter(found.values()), None)


def _hidden(output: Any) -> Tensor:
    """The last hidden states in what the model's inside gives."""
    found = getattr(output, "last_hidden_state", output)
    found = found if isinstance(found, Tensor) else output[0]
    return found.detach()
