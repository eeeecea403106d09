"""PEFT's ADALORA: triplets B diag(E) A; a pruned file has the kept ones only, and says which in rank_pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from rankloom.core.adapter import Adapter
from rankloom.core.method import Method
from rankloom.errors import FileError
from rankloom.formats.entry import Entry, plain
from rankloom.formats.manifest import Source
from rankloom.formats.peft import fields as f
from rankloom.formats.peft.paths import Paths
from rankloom.formats.peft.translator import Translator
from rankloom.formats.view import View
from rankloom.methods.adalora import AdaLoRA, AdaLoRAAdapter

FACTORS = ("A", "B", "E")


class Adalora(Translator):
    """`ADALORA`."""

    peft_type = "ADALORA"
    leaves = (AdaLoRAAdapter,)
    kinds = frozenset({"linear", "conv1d_transposed", "conv2d"})
    own_suffixes = ("lora_A", "lora_B", "lora_E")
    fields = {
        **f.LORA_FAMILY,
        "r": f.positive(8),
        "init_r": f.positive(12),
        "target_r": f.positive(8),
        "tinit": f.COUNT,
        "tfinal": f.COUNT,
        "deltaT": f.positive(1),
        "beta1": f.FRACTION,
        "beta2": f.FRACTION,
        "orth_reg_weight": f.WEIGHT,
        "total_step": f.Field(f.Whole),
        "rank_pattern": f.Field(Mapping[str, tuple[bool, ...]]),
        "alpha_pattern": f.Field(Annotated[Mapping[str, Any], f.EMPTY], {}),
        "use_dora": f.OFF,
        "use_rslora": f.OFF,
        "lora_bias": f.OFF,
        "init_lora_weights": f.Field(bool, True),
        "target_parameters": f.Field(Annotated[tuple[str, ...], f.EMPTY], ()),
    }

    def site_problems(self, view: View) -> list[str]:
        found = []
        if not isinstance(view.plan.method, AdaLoRA):
            found.append(f"PEFT's ADALORA has no {type(view.plan.method).__name__} around it")
        if view.plan.rank_pattern or view.plan.alpha_pattern:
            found.append("PEFT's ADALORA has no rank_pattern or alpha_pattern of settings")
        if any(site.groups > 1 for site, _ in view.adapted):
            found.append("PEFT's ADALORA does not reach grouped convolutions")
        return found

    def site_entries(self, view: View, paths: Paths) -> list[Entry]:
        masks = _masks(view)
        return [
            entry
            for site, adapter in view.adapted
            for entry in _entries(paths.site(site), adapter, masks.get(site.name))
        ]

    def entries_in(self, view: View, source: Source) -> list[Entry]:
        paths = Paths(view)
        own = [e for site, adapter in view.adapted for e in _entries(paths.site(site), adapter, None)]
        return [*own, *self.other_entries(view, paths)]

    def method_fields(self, view: View) -> dict[str, Any]:
        method = view.plan.method
        assert isinstance(method, AdaLoRA)
        masks = _masks(view)
        return {
            **{k: getattr(method, k) for k in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2")},
            "orth_reg_weight": method.orth_reg_weight,
            "lora_alpha": int(method.lora_alpha) if method.lora_alpha == int(method.lora_alpha) else method.lora_alpha,
            "lora_dropout": method.lora_dropout,
            "total_step": method.tinit + method.tfinal + 1,
            "rank_pattern": {f"{name}.lora_E": _padded(mask, method.init_r) for name, mask in masks.items()} or None,
        }

    def notes(self, view: View) -> list[str]:
        return ["total_step is the least that PEFT accepts: set the real one before training on with PEFT"]

    def method(self, values: Mapping[str, Any], where: str) -> Method:
        same = ("init_r", "target_r", "tinit", "tfinal", "deltaT")
        numbers = ("lora_alpha", "lora_dropout", "beta1", "beta2", "orth_reg_weight")
        settings: dict[str, Any] = {k: values[k] for k in same} | {k: float(values[k]) for k in numbers}
        return AdaLoRA(**settings)

    def prepare(self, view: View, source: Source) -> None:
        """Give every adapter the number of triplets that the file has for it."""
        pattern = source.config.get("rank_pattern") or {}
        kept = {name.removesuffix(".default").removesuffix(".lora_E"): sum(flags) for name, flags in pattern.items()}
        names = {site.name for site, _ in view.adapted}
        for name in kept.keys() - names:
            raise FileError(f"{source.config_file}: rank_pattern names {name!r}, for which the file has no tensors")
        for site, adapter in view.adapted:
            assert isinstance(adapter, AdaLoRAAdapter)
            if site.name in kept:
                adapter.fit_to(_shapes(adapter, kept[site.name]))


def _shapes(adapter: AdaLoRAAdapter, rank: int) -> dict[str, tuple[int, ...]]:
    return {"A": (rank, adapter.A.shape[-1]), "E": (rank, 1), "B": (adapter.B.shape[-2], rank)}


def _masks(view: View) -> dict[str, Tensor]:
    """Which triplets are kept, by site; empty while nothing is pruned."""
    held = {site.name: adapter for site, adapter in view.adapted if isinstance(adapter, AdaLoRAAdapter)}
    masks = {name: (adapter.E != 0).flatten() for name, adapter in held.items()}
    method = view.plan.method
    assert isinstance(method, AdaLoRA)
    fresh = not any(bool(mask.any()) for mask in masks.values())
    full = all(bool(mask.all()) and mask.numel() == method.init_r for mask in masks.values())
    if full or (fresh and all(mask.numel() == method.init_r for mask in masks.values())):
        return {}
    for mask in masks.values():
        if mask.numel() and not mask.any():
            mask[0] = True
    return masks


def _padded(mask: Tensor, length: int) -> list[bool]:
    flags = mask.tolist()
    return [bool(v) for v in flags] + [False] * (length - len(flags))


def _entries(stem: str, adapter: Adapter, mask: Tensor | None) -> list[Entry]:
    found = []
    for factor in FACTORS:
        tensor = getattr(adapter, factor)
        key = f"{stem}.{adapter.peft_names[factor]}"
        found.append(plain(key, tensor) if mask is None else _kept(key, tensor, mask, 1 if factor == "B" else 0))
    return found


def _kept(key: str, tensor: Tensor, mask: Tensor, axis: int) -> Entry:
    rows = mask.nonzero().flatten()

    def put(value: Tensor) -> None:
        with torch.no_grad():
            tensor.index_copy_(axis, rows, value.to(tensor.dtype))

    return Entry(key, lambda: tensor.detach().index_select(axis, rows), put)
