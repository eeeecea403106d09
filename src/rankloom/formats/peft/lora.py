"""PEFT's LORA: a factor pair for each place, with DoRA's magnitudes, a bias after B, and rank and alpha patterns."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from torch import nn

from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.core.site import LAYER, Site
from rankloom.errors import FileError
from rankloom.formats.entry import Entry, mapped
from rankloom.formats.manifest import Source
from rankloom.formats.peft import fields as f
from rankloom.formats.peft.layout import CONVS, LAYOUTS, LINEAR_B, Factor, factors, magnitude_shape
from rankloom.formats.peft.pairs import (
    LEAVES,
    Pair,
    dropout_of,
    forget_start,
    leaf,
    normed,
    trained_pair,
    whole_pair,
    within,
)
from rankloom.formats.peft.paths import Paths
from rankloom.formats.peft.ranks import place_of, plan_patterns, rank_and_scale, rank_fields
from rankloom.formats.peft.translator import Translator
from rankloom.formats.view import View, attention_of
from rankloom.methods.dora import DoRA
from rankloom.methods.lora import LoRA


class Lora(Translator):
    """`LORA`."""

    peft_type = "LORA"
    leaves = LEAVES
    kinds = frozenset(LAYOUTS)
    own_suffixes = (
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    fields = {
        **f.LORA_FAMILY,
        "r": f.positive(8),
        "use_rslora": f.FLAG,
        "use_dora": f.FLAG,
        "lora_bias": f.FLAG,
        "init_lora_weights": f.Field(bool | str, True),
        "rank_pattern": f.Field(Annotated[Mapping[str, f.Whole], f.SIMPLE], {}),
        "alpha_pattern": f.Field(Annotated[Mapping[str, float], f.SIMPLE], {}),
        "target_parameters": f.LIST,
    }

    def site_problems(self, view: View) -> list[str]:
        found = [reason for site, adapter in view.adapted for reason in _problems(site, adapter)]
        if found:
            return found
        if len({normed(adapter) for _, adapter in view.adapted}) > 1:
            found.append("DoRA on some layers and not on others")
        if len({"bias" in trained_pair(adapter).parts for _, adapter in view.adapted}) > 1:
            found.append("lora_bias on some layers and not on others")
        return [*found, *_attention_problems(view), *_nesting_problems(view)]

    def site_entries(self, view: View, paths: Paths) -> list[Entry]:
        """PEFT (0.21) adds the change of an attention's out_proj twice: its file holds half of it."""
        return [
            _halved(entry) if _is_out_proj(site, view) and entry.key.endswith(LINEAR_B) else entry
            for site, adapter in view.adapted
            for entry in _entries(site, adapter, whole_pair, paths)
        ]

    def entries_in(self, view: View, source: Source) -> list[Entry]:
        """What PEFT computes from its own file: a start that rewrites the base leaves the trained pair only, and the
        change of an attention's out_proj counts twice. A file of ours means what it says.
        """
        if source.plan is not None:
            return self.entries(view)
        for site, adapter in view.adapted:
            for reason in _problems(site, adapter):
                raise FileError(f"{reason}, so {source.weights_file} cannot be read as PEFT computes it")
        paths = Paths(view)
        own = [
            _halved(entry) if _is_out_proj(site, view) and entry.key.endswith(LINEAR_B) else entry
            for site, adapter in view.adapted
            for entry in _entries(site, adapter, trained_pair, paths)
        ]
        return [*own, *self.other_entries(view, paths)]

    def prepare(self, view: View, source: Source) -> None:
        """Give every pair the rank that a file of ours has for it: a training may have changed the plan's. In PEFT's
        own files embeddings start plainly, whatever the start is called.
        """
        paths = Paths(view)
        for site, adapter in view.adapted if source.plan is None else ():
            if site.kind.name == "embedding":
                forget_start(adapter)
        for site, adapter in view.adapted if source.plan is not None else ():
            lora, said = (
                within(adapter),
                [e for e in _entries(site, adapter, trained_pair, paths) if e.key in source.header],
            )
            if type(lora) in LEAVES and said:
                _take_rank(lora, math.prod(source.header[said[0].key].shape) / said[0].get().numel())

    def method_fields(self, view: View) -> dict[str, Any]:
        adapter = view.adapted[0][1]
        lora = leaf(adapter)
        assert lora is not None
        return {
            **rank_fields(view),
            "lora_dropout": 0.0 if _has_bare(view) else dropout_of(adapter),
            "use_dora": normed(adapter),
            "lora_bias": lora.bias is not None,
            "init_lora_weights": "gaussian" if lora.start == "gaussian" else True,
        }

    def notes(self, view: View) -> list[str]:
        if _has_bare(view) and any(dropout_of(adapter) for _, adapter in view.adapted):
            return ["lora_dropout is left out of the PEFT config: PEFT refuses it beside target_parameters"]
        return []

    def method(self, values: Mapping[str, Any], where: str) -> Method:
        start = f.start_of(values["init_lora_weights"], where)
        if start.lost:
            warnings.warn(f"{where}: init_lora_weights={values['init_lora_weights']!r}: {start.lost}", stacklevel=6)
        lora = LoRA(
            r=values["r"],
            lora_alpha=float(values["lora_alpha"]),
            lora_dropout=float(values["lora_dropout"]),
            init_lora_weights=start.ours,
            scaling="rslora" if values["use_rslora"] else "standard",
            lora_bias=values["lora_bias"],
        )
        return DoRA(lora) if values["use_dora"] else lora

    def site_patterns(
        self, values: Mapping[str, Any], modules: Mapping[str, nn.Module], names: Sequence[str], where: str
    ) -> dict[str, Any]:
        return plan_patterns(values, modules, names, where)


def _take_rank(lora: Adapter, times: float) -> None:
    """A rank that is so many times the adapter's own, if there is one."""
    a, b = lora.get_parameter("A"), lora.get_parameter("B")
    rank = times * a.shape[-2]
    if times != 1 and rank.is_integer():
        lora.fit_to({"A": (*a.shape[:-2], int(rank), a.shape[-1]), "B": (*b.shape[:-1], int(rank))})


def _entries(site: Site, adapter: Adapter, pair_of: Callable[[Adapter], Pair], paths: Paths) -> Iterator[Entry]:
    stem = paths.site(site)
    parts = pair_of(adapter).parts
    for factor in factors(site):
        yield _through(parts[factor.ours], factor, stem)
    if "bias" in parts:
        yield Entry(f"{stem}.lora_B.bias", parts["bias"].get, parts["bias"].put)
    if normed(adapter):
        size = adapter.magnitude.shape[-1]
        shape = magnitude_shape(site, size)
        key = f"{stem}.{adapter.peft_names['magnitude']}"
        yield mapped(key, adapter.magnitude, lambda m: m.reshape(shape), lambda m: m.reshape(size))


def _through(part: Entry, factor: Factor, stem: str) -> Entry:
    return Entry(f"{stem}.{factor.key}", lambda: factor.out(part.get()), lambda value: part.put(factor.back(value)))


def _problems(site: Site, adapter: Adapter) -> Iterator[str]:
    kind, layer, name = site.kind.name, site.layer, site.name
    dora, lora = normed(adapter), leaf(adapter)
    if lora is None:
        inside = f" over {type(adapter.inner).__name__}" if dora else ""
        yield f"PEFT's LORA has no {type(adapter).__name__}{inside} ({name})"
        return
    if dora and site.groups > 1:
        yield f"PEFT's DoRA takes other norms of a grouped convolution ({name})"
    if dora and site.bare:
        yield f"PEFT's DoRA does not reach bare parameters ({name})"
    if lora.bias is not None and (dora or kind == "embedding"):
        yield f"PEFT has no lora_bias {'with DoRA' if dora else 'on embeddings'} ({name})"
    if kind in CONVS:
        spread = any(d != 1 and k != 1 for d, k in zip(layer.dilation, layer.kernel_size))  # type: ignore[arg-type]
        if spread or layer.padding_mode != "zeros":
            yield f"PEFT ignores dilation and padding_mode of a convolution ({name})"
    if site.bare and len(site.shape) > 3:
        yield f"PEFT adapts parameters of 2 or 3 dimensions, {name} has {len(site.shape)}"
    if site.bare and not site.path:
        yield f"PEFT cannot adapt a parameter of the model itself ({name})"


def _attention_problems(view: View) -> Iterator[str]:
    """PEFT adapts an attention with one rank: its joint input projection and its output."""
    parts: dict[str, dict[str, tuple[int, float]]] = {}
    for site, adapter in view.adapted:
        if attention_of(site, view.modules) is not None:
            parts.setdefault(place_of(site, view), {})[site.slot] = rank_and_scale(site, adapter)
    for name, found in parts.items():
        if found.keys() != {"in_proj_weight", "weight"} or len(set(found.values())) > 1:
            yield f"PEFT adapts the joint input projection and the output of an attention with one rank ({name})"


def _nesting_problems(view: View) -> Iterator[str]:
    slots: dict[str, set[str]] = {}
    for site, _ in view.adapted:
        path = site.path
        slots.setdefault(path, set()).add(site.slot)
        has_bias = view.modules[path]._parameters.get("bias") is not None
        if site.bare and has_bias and view.plan.bias == "lora_only":
            yield f"bias='lora_only' beside a target parameter of {path!r}, which has a bias"
    for path, used in slots.items():
        if LAYER in used and len(used) > 1:
            yield f"PEFT adapts either the layer {path!r} or its parameters"


def _has_bare(view: View) -> bool:
    return any(site.bare for site, _ in view.adapted)


def _is_out_proj(site: Site, view: View) -> bool:
    return attention_of(site, view.modules) not in (None, site.path)


def _halved(entry: Entry) -> Entry:
    return Entry(entry.key, lambda: entry.get() / 2, lambda value: entry.put(2 * value))
