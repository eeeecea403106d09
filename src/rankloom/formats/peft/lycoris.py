"""PEFT's LOHA and LOKR: elementwise and Kronecker products, with patterns of rank and alpha."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.core.site import Site
from rankloom.errors import FileError
from rankloom.formats.entry import Entry
from rankloom.formats.manifest import Source
from rankloom.formats.patterns import fault
from rankloom.formats.peft import fields as f
from rankloom.formats.peft.beside import own_entries
from rankloom.formats.peft.paths import Paths
from rankloom.formats.peft.ranks import hitting, tidy
from rankloom.formats.peft.translator import Translator
from rankloom.formats.view import View
from rankloom.methods.loha import LoHa, LoHaAdapter
from rankloom.methods.lokr import LoKr, LoKrAdapter

PATTERNS = ("rank_pattern", "alpha_pattern")


class Lycoris(Translator):
    """What both have in common: settings of the same names, and every tensor as it is."""

    settings: type[Method]
    kinds = frozenset({"linear", "conv1d", "conv2d"})
    shared = {
        **f.TARGETED,
        "r": f.positive(8),
        "alpha": f.ALPHA,
        "rank_dropout": f.PROBABILITY,
        "module_dropout": f.PROBABILITY,
        "use_effective_conv2d": f.FLAG,
        "rank_pattern": f.Field(Annotated[Mapping[str, f.Whole], f.SIMPLE], {}),
        "alpha_pattern": f.Field(Annotated[Mapping[str, float], f.SIMPLE], {}),
    }

    @abstractmethod
    def mixed(self, site: Site, adapter: Adapter) -> Iterator[str]:
        """Why PEFT computes something else at a site."""

    def site_problems(self, view: View) -> list[str]:
        plan = view.plan
        if not isinstance(plan.method, self.settings):
            return [f"PEFT's {self.peft_type} has no {type(plan.method).__name__} around it"]
        found = [reason for site, adapter in view.adapted for reason in self.mixed(site, adapter)]
        odd = [setting for setting in PATTERNS if fault(getattr(plan, setting))]
        return found + [f"{setting} has an expression that no reader of files runs" for setting in odd]

    def site_entries(self, view: View, paths: Paths) -> list[Entry]:
        return [e for site, adapter in view.adapted for e in own_entries(adapter, paths.site(site))]

    def entries_in(self, view: View, source: Source) -> list[Entry]:
        for reason in (reason for site, adapter in view.adapted for reason in self.mixed(site, adapter)):
            raise FileError(f"{reason}, so {source.weights_file} cannot be read as PEFT computes it")
        return self.entries(view)

    def method_fields(self, view: View) -> dict[str, Any]:
        method, plan = view.plan.method, view.plan
        same = {key: getattr(method, key) for key in self.fields if hasattr(method, key)}
        alphas = {key: tidy(value) for key, value in plan.alpha_pattern.items()}
        ranks = dict(plan.rank_pattern)
        return {**same, "alpha": tidy(method.lora_alpha), "rank_pattern": ranks, "alpha_pattern": alphas}  # type: ignore[attr-defined]

    def method(self, values: Mapping[str, Any], where: str) -> Method:
        floats = {"rank_dropout", "module_dropout"}
        same = {key: values[key] for key in self.fields if key in self.settings.__dataclass_fields__}
        numbers = {key: float(values[key]) for key in floats}
        return self.settings(**{**same, **numbers, "lora_alpha": float(values["alpha"])})

    def site_patterns(
        self, values: Mapping[str, Any], modules: Mapping[str, nn.Module], names: Sequence[str], where: str
    ) -> dict[str, Any]:
        return {key: hitting(values[key], {}, names, names, f"{where}: {key}") for key in PATTERNS}


class Loha(Lycoris):
    """`LOHA`."""

    peft_type = "LOHA"
    settings = LoHa
    leaves = (LoHaAdapter,)
    own_suffixes = tuple(LoHaAdapter.peft_names.values())
    fields = {**Lycoris.shared, "init_weights": f.Field(bool, True)}

    def mixed(self, site: Site, adapter: Adapter) -> Iterator[str]:
        return iter(())


class Lokr(Lycoris):
    """`LOKR`."""

    peft_type = "LOKR"
    settings = LoKr
    leaves = (LoKrAdapter,)
    own_suffixes = tuple(LoKrAdapter.peft_names.values())
    fields = {
        **Lycoris.shared,
        "decompose_both": f.FLAG,
        "decompose_factor": f.Field(int, -1),
        "rank_dropout_scale": f.FLAG,
        "init_weights": f.Field(bool | Literal["lycoris"], True),
    }

    def mixed(self, site: Site, adapter: Adapter) -> Iterator[str]:
        if site.kind.name == "conv1d" and {"w2", "t2"} & dict(adapter.named_parameters()).keys():
            yield f"PEFT (0.21) mixes the axes of a Conv1d's second factor, unless it is of low rank ({site.name})"

    def method_fields(self, view: View) -> dict[str, Any]:
        found = super().method_fields(view)
        return {**found, "init_weights": "lycoris" if found["init_weights"] == "lycoris" else True}

    def method(self, values: Mapping[str, Any], where: str) -> Method:
        start = "lycoris" if values["init_weights"] == "lycoris" else "default"
        factor = values["decompose_factor"]
        factor = factor if factor > 0 or factor == -1 else 1
        return super().method({**values, "init_weights": start, "decompose_factor": factor}, where)
