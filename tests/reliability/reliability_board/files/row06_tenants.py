"""Row 6: an adapter never changes the base or another adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rankloom as rl
from rankloom.core.bank import Bank
from rankloom.core.targets import base_tensors
from rankloom.errors import FileError
from rankloom.formats import loading
from rankloom.formats.entry import Entry
from rankloom.formats.peft.lora import Lora
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.files.world import (
    Files,
    adapted,
    answer,
    bare,
    base,
    digest,
    folder,
    good,
    silent,
    tensors_of,
    with_config,
    with_tensors,
    write,
)  # fmt: skip


def measure(budget: Budget) -> Finding:
    """Tenant A is loaded, a hostile file as B, A is asked again, B is removed, A and the bare base are asked again."""
    faults = []
    honest = bare(good(adapted(base(), seed=2)))
    with silent():
        for name, files in {"an honest file": honest, **hostile(honest)}.items():
            fault = _tenant(files)
            if fault:
                faults.append(f"{name}: {fault}")
    count = len(hostile(honest))
    return Finding(
        not faults, f"{count} hostile files and an honest one; {len(faults)} change base or tenant A", tuple(faults)
    )


def hostile(honest: Files) -> dict[str, Files]:
    """Files that reach for what is not theirs."""
    big = torch.full((32, 32), 3.0)
    pre = "base_model.model.model.layers.0.self_attn"
    extra = {
        "the base's own weight": {f"{pre}.q_proj.weight": big},
        "the weight inside the wrapper": {f"{pre}.q_proj.base_layer.weight": big},
        "another projection": {f"{pre}.k_proj.weight": big},
        "the embedding": {"base_model.model.model.embed_tokens.weight": torch.ones(64, 32)},
        "the head": {"base_model.model.lm_head.weight": torch.ones(64, 32)},
        "a norm": {"base_model.model.model.norm.weight": torch.zeros(32)},
        "tenant A by name": {f"{pre}.q_proj.lora_A.a.weight": torch.ones(8, 32)},
        "the bank of tenant A": {"rankloom.a.A": torch.ones(8, 32)},
        "a copy that differs": {f"{pre}.q_proj.modules_to_save.weight": big},
    }
    made = {name: with_tensors(honest, **tensors) for name, tensors in extra.items()}
    saved = with_tensors(honest, **{"base_model.model.model.norm.weight": torch.zeros(32)})
    key = min(tensors_of(honest))
    return {
        **made,
        "the norm by modules_to_save": with_config(saved, modules_to_save=["model.norm"]),
        "another rank": with_config(honest, r=4),
        "a start that rewrites the base": with_config(honest, init_lora_weights="olora"),
        "factors of NaN": with_tensors(honest, **{key: tensors_of(honest)[key] * float("nan")}),
    }


def _tenant(files: Files) -> str | None:
    model = adapted(base(), "a")
    bank: Bank = model.rankloom  # type: ignore[assignment]
    before = _answers(model, bank)
    with folder() as root:
        try:
            rl.load(model, write(files, root / "b"), "b")
        except FileError:
            pass
        else:
            bank.use("b")
            answer(model)
            if _answers(model, bank) != before:
                return "base or tenant A answers otherwise while it is loaded"
            rl.detach(model, "b")
    return None if _answers(model, bank) == before else "base or tenant A answers otherwise after it is gone"


def _answers(model: nn.Module, bank: Bank) -> tuple[str, ...]:
    with bank.using():
        bare_ = digest(answer(model))
    with bank.using("a"):
        tenant = digest(answer(model))
    factors = [digest(tensor) for _, tensor, _ in bank.tensors("a")]
    weights = [digest(tensor) for _, _, _, tensor in base_tensors(model)]
    return (bare_, tenant, *factors, *weights)


def _reaching(self: Any, view: Any, source: Any) -> list[Entry]:
    """The loader of a careless library: every key of the file that the model has is written into the model."""
    found = _entries_in(self, view, source)
    own = {entry.key for entry in found}
    named = dict(view.model.named_parameters())
    for key in source.header:
        plain = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if key not in own and plain in named:
            found.append(Entry(key, named[plain].detach, named[plain].data.copy_))
    return found


_entries_in = Lora.entries_in
ROW = Row(
    6,
    "an adapter never changes the base or another adapter",
    measure,
    (
        Sabotage("every tensor of the file is written", lambda: swapped(Lora, "entries_in", _reaching)),
        Sabotage("loading writes to the base", lambda: swapped(loading, "_check_bank", _spoil)),
    ),
)


def _spoil(model: nn.Module, name: str) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
