"""An adapter of a bank sorted by what a file needs: adapted sites, tensors trained whole, token rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rankloom.core.adapter import Adapter, Sum
from rankloom.core.bank import Bank
from rankloom.core.fitted import Fitted
from rankloom.core.graft import LAYER
from rankloom.core.plan import Plan
from rankloom.core.site import Shared
from rankloom.core.targets import base_modules, matches
from rankloom.core.whole import TokenRowsAdapter, WholeAdapter


@dataclass(frozen=True)
class View:
    """`adapted`, `whole`, `tokens`: (place, the part of the adapter there) out of `fitted`; `shared`: what all of them
    use; `modules`: the base's, by name.
    """

    model: nn.Module
    name: str
    plan: Plan
    fitted: list[Fitted]
    shared: Shared
    modules: dict[str, nn.Module]
    adapted: list[tuple[Fitted, Adapter]]
    whole: list[tuple[Fitted, WholeAdapter]]
    tokens: list[tuple[Fitted, TokenRowsAdapter]]

    def saved_whole(self, path: str) -> bool:
        """Whether the module `path` lies in one of `modules_to_save`."""
        parts = path.split(".")
        return any(matches(self.plan.modules_to_save, ".".join(parts[: i + 1])) for i in range(len(parts)))


def view(bank: Bank, name: str) -> View:
    """The adapter `name` of `bank`, sorted."""
    everything = bank.fitted(name)
    return arranged(bank.model, name, bank.plans[name], everything, bank.shared_of(name))


def arranged(model: nn.Module, name: str, plan: Plan, everything: list[Fitted], shared: Shared) -> View:
    """Adapters in their places (planted or not), sorted."""
    found = View(model, name, plan, everything, shared, dict(base_modules(model)), [], [], [])
    for fitted in everything:
        parts = list(fitted.adapter.parts) if isinstance(fitted.adapter, Sum) else [fitted.adapter]
        for part in parts:
            if isinstance(part, WholeAdapter):
                found.whole.append((fitted, part))
            elif isinstance(part, TokenRowsAdapter):
                found.tokens.append((fitted, part))
            else:
                assert isinstance(part, Adapter)
                found.adapted.append((fitted, part))
    return found


def attention_of(fitted: Fitted, modules: dict[str, nn.Module]) -> str | None:
    """Name of the `nn.MultiheadAttention` whose own weight this place is, else None."""
    if fitted.place.slot == LAYER:
        return None
    if isinstance(fitted.place.layer, nn.MultiheadAttention):
        return fitted.place.path
    parent = fitted.place.path.rpartition(".")[0]
    return parent if isinstance(modules.get(parent), nn.MultiheadAttention) else None
