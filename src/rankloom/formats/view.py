"""An adapter of a bank sorted by what a file needs: adapted sites, tensors trained whole, token rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rankloom.core.adapter import Adapter, Sum
from rankloom.core.bank import Bank
from rankloom.core.plan import Plan
from rankloom.core.shared import Shared
from rankloom.core.site import LAYER, Site
from rankloom.core.targets import base_modules, matches
from rankloom.core.whole import TokenRowsAdapter, WholeAdapter


@dataclass(frozen=True)
class View:
    """`adapted`, `whole`, `tokens`: (site, the part of the adapter there) out of `sites`; `shared`: what all of them
    use; `modules`: the base's, by name.
    """

    model: nn.Module
    name: str
    plan: Plan
    sites: list[Site]
    shared: Shared
    modules: dict[str, nn.Module]
    adapted: list[tuple[Site, Adapter]]
    whole: list[tuple[Site, WholeAdapter]]
    tokens: list[tuple[Site, TokenRowsAdapter]]

    def saved_whole(self, path: str) -> bool:
        """Whether the module `path` lies in one of `modules_to_save`."""
        parts = path.split(".")
        return any(matches(self.plan.modules_to_save, ".".join(parts[: i + 1])) for i in range(len(parts)))


def view(bank: Bank, name: str) -> View:
    """The adapter `name` of `bank`, sorted."""
    everything = bank.sites(name)
    return arranged(bank.model, name, bank.plans[name], everything, bank.shared_of(name))


def arranged(model: nn.Module, name: str, plan: Plan, everything: list[Site], shared: Shared) -> View:
    """The adapters of sites (added to the model or not), sorted."""
    found = View(model, name, plan, everything, shared, dict(base_modules(model)), [], [], [])
    for site in everything:
        parts = list(site.adapter.parts) if isinstance(site.adapter, Sum) else [site.adapter]
        for part in parts:
            if isinstance(part, WholeAdapter):
                found.whole.append((site, part))
            elif isinstance(part, TokenRowsAdapter):
                found.tokens.append((site, part))
            else:
                assert isinstance(part, Adapter)
                found.adapted.append((site, part))
    return found


def attention_of(site: Site, modules: dict[str, nn.Module]) -> str | None:
    """Name of the `nn.MultiheadAttention` whose own weight this place is, else None."""
    if site.slot == LAYER:
        return None
    if isinstance(site.layer, nn.MultiheadAttention):
        return site.path
    parent = site.path.rpartition(".")[0]
    return parent if isinstance(modules.get(parent), nn.MultiheadAttention) else None
