"""LoRAHub: the weights of a library of LoRAs for a new task, found from a few examples without a gradient.

Minimises mean loss + l1 · mean |wᵢ| over w ∈ [−bound, bound]ⁿ from w = 0, by CMA-ES. "factor" is the paper's
composition, ΔW = (Σ wᵢ√s Bᵢ)(Σ wᵢ√s Aᵢ), with its cross terms; "delta" is Σ wᵢ ΔWᵢ. Huang et al., COLM 2024,
arXiv 2307.13269; CMA-ES: Hansen & Ostermeier, 2001 (library `cma`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankloom.compose.arithmetic import combine, parts_of, place, summed
from rankloom.compose.composer import Composer
from rankloom.core.attach import detach
from rankloom.core.bank import Bank
from rankloom.errors import MissingExtra, SettingsError
from rankloom.settings import Count, NotNegative, Positive, Seed

SCRATCH = "rankloom-hub"
Loss = Callable[[nn.Module, Any], Tensor]
Objective = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Found:
    """The best `weights` by name, their objective `value`, and the values of all `evaluations` in order."""

    weights: dict[str, float]
    value: float
    evaluations: list[float]


@dataclass(frozen=True)
class LoRAHub(Composer):
    """`num_modules`: drawn from more names than that (by `seed`); `budget`: evaluations of the few-shot loss; `bound`,
    `l1` as in the module's formula; `sigma`: CMA-ES's first step size; `optimizer`: "cma", "one_plus_one" (a (1+1)
    evolution strategy with the one-fifth rule) or "random"; `mode`: "factor" needs LoRAs of one rank.
    """

    num_modules: Count = 20
    budget: Count = 40
    bound: Positive = 1.5
    l1: NotNegative = 0.05
    sigma: Positive = 0.5
    mode: Literal["factor", "delta"] = "factor"
    optimizer: Literal["cma", "one_plus_one", "random"] = "cma"
    seed: Seed = 0

    def __call__(self, bank: Bank, names: Sequence[str], **evidence: Any) -> dict[str, float]:
        """The weights alone; `evidence` as for `search`."""
        return self.search(bank, names, **evidence).weights

    def search(self, bank: Bank, names: Sequence[str], *, batches: Sequence[Any], loss: Loss) -> Found:
        """The best weights for `loss(model, batch)`, averaged over the `batches`; the bank is left as it was.

        Raises `NotMergeable` or `SettingsError` for adapters that cannot be composed this way.
        """
        if not names or not batches:
            raise SettingsError("LoRAHub: give the names of the adapters and at least one batch of examples")
        chosen = self.candidates(names)
        values: list[float] = []

        def objective(w: Sequence[float]) -> float:
            with composed(dict(zip(chosen, map(float, w)))):
                value = sum(float(loss(bank.model, batch)) for batch in batches) / len(batches)
            values.append(value + self.l1 * sum(map(abs, w)) / len(w))
            return values[-1]

        with torch.no_grad(), _evaluating(bank.model), _composer(bank, chosen, self.mode) as composed:
            best, value = SEARCHES[self.optimizer](objective, len(chosen), self)
        return Found(dict(zip(chosen, best)), value, values)

    def candidates(self, names: Sequence[str]) -> list[str]:
        """The adapters that are composed: all, or `num_modules` drawn at random, in the order of the names."""
        unique = list(dict.fromkeys(names))
        if len(unique) <= self.num_modules:
            return unique
        drawn = set(random.Random(self.seed).sample(unique, self.num_modules))
        return [name for name in unique if name in drawn]

    def apply(self, bank: Bank, weights: Mapping[str, float], name: str) -> None:
        """Attach the composition as one LoRA, which saves and merges as any other; it is not active yet."""
        combine(bank, weights, name, how="factor" if self.mode == "factor" else "cat")


Using = Callable[[Mapping[str, float]], Any]


@contextmanager
def _composer(bank: Bank, names: Sequence[str], mode: str) -> Iterator[Using]:
    """What makes weights active: of the adapters themselves, or on one scratch LoRA that is rewritten."""
    if mode == "delta":
        yield lambda weights: bank.using(**dict[str, Any](weights))
        return
    units = {name: summed(parts_of(bank, {name: 1.0}), "factor", 0) for name in names}
    start = summed(parts_of(bank, dict.fromkeys(names, 0.0)), "factor", 0)
    active = bank.selector.default
    place(bank, SCRATCH, {at: (made.a, made.b) for at, made in start.items()}, names[0])
    try:
        bank.selector.default = active
        for parameter in (p for _, p, _ in bank.tensors(SCRATCH)):
            parameter.requires_grad_(False)

        def write(weights: Mapping[str, float]) -> Any:
            new = {key: torch.zeros_like(tensor) for key, tensor in bank.state(SCRATCH, copy=False).items()}
            for name, weight in weights.items():
                for at, unit in units[name].items():
                    new[f"{at}:A"] += weight * unit.a
                    new[f"{at}:B"] += weight * unit.b
            bank.load_state(SCRATCH, new)
            return bank.using(SCRATCH)

        yield write
    finally:
        detach(bank.model, SCRATCH)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


def _cma(objective: Objective, n: int, how: LoRAHub) -> tuple[list[float], float]:
    """CMA-ES in the box, from 0; the best point that was evaluated, 0 among them."""
    try:
        import cma  # type: ignore[import-untyped]
        import numpy as np
    except ImportError as error:
        raise MissingExtra("cma", "search", "LoRAHub(optimizer='cma')") from error
    best, value = [0.0] * n, objective([0.0] * n)
    if n == 1 or how.budget == 1:
        return (best, value) if how.budget == 1 else _one_plus_one(objective, n, how, (best, value))
    before = np.random.get_state()
    try:
        options = {
            "bounds": [-how.bound, how.bound],
            "seed": how.seed % (1 << 31) + 1,
            "verbose": -9,
            "maxfevals": how.budget - 1,
        }
        search = cma.CMAEvolutionStrategy([0.0] * n, min(how.sigma, how.bound), options)
        left = how.budget - 1
        while left and not search.stop():
            points = [[float(v) for v in point] for point in search.ask()]
            values = [objective(point) for point in points[:left]]
            left -= len(values)
            here = min(range(len(values)), key=values.__getitem__)
            if values[here] < value:
                best, value = points[here], values[here]
            if len(values) == len(points):
                search.tell(points, values)
    finally:
        np.random.set_state(before)
    return best, value


def _one_plus_one(
    objective: Objective, n: int, how: LoRAHub, start: tuple[list[float], float] | None = None
) -> tuple[list[float], float]:
    """A (1+1) evolution strategy; the step grows with each success and shrinks so that one in five keeps it."""
    draw, sigma = random.Random(how.seed), how.sigma
    best, value = start or ([0.0] * n, objective([0.0] * n))
    for _ in range(how.budget - 1):
        point = [min(max(v + sigma * draw.gauss(0, 1), -how.bound), how.bound) for v in best]
        now = objective(point)
        sigma *= 1.5 if now < value else 1.5**-0.25
        if now < value:
            best, value = point, now
    return best, value


def _random(objective: Objective, n: int, how: LoRAHub) -> tuple[list[float], float]:
    """The best of 0 and uniform draws from the box."""
    draw = random.Random(how.seed)
    points = [[0.0] * n, *([draw.uniform(-how.bound, how.bound) for _ in range(n)] for _ in range(how.budget - 1))]
    values = [objective(point) for point in points]
    here = min(range(len(points)), key=values.__getitem__)
    return points[here], values[here]


SEARCHES: Mapping[str, Callable[[Objective, int, LoRAHub], tuple[list[float], float]]] = {
    "cma": _cma,
    "one_plus_one": _one_plus_one,
    "random": _random,
}
