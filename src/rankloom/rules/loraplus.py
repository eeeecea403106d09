"""LoRA+: a higher learning rate for the out factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankloom.core.rule import Rule, Run
from rankloom.settings import Positive


@dataclass
class LoRAPlus(Rule):
    """lr_B = ratio · lr_A (Hayou et al., ICML 2024, arXiv 2402.12354). By role: out factors, and 1-d tensors as in the
    reference code, take lr·ratio; the factors of embeddings' adapters take `loraplus_lr_embedding` (None: as any
    other); 1-d tensors do not decay.
    """

    ratio: Positive = 16.0
    loraplus_lr_embedding: Positive | None = 1e-6

    def groups(self, run: Run, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Split every group into in-like, out-like and embedding tensors; empty groups are left out."""
        roles = {id(p): role for _, p, role in run.bank.trainable()}
        embeddings = {
            id(p)
            for name in run.bank.trained
            for f in run.bank.sites(name)
            if f.kind.name == "embedding"
            for p in f.adapter.parameters()
            if p.ndim > 1
        }
        if self.loraplus_lr_embedding is None:
            embeddings = set()
        new = []
        for group in groups:
            parts: dict[str, list[Any]] = {}
            for p in group["params"]:
                out_like = p.ndim < 2 or roles.get(id(p)) == "out"
                kind = "embedding" if id(p) in embeddings else "out" if out_like else "in"
                kind += "/1-d" if p.ndim < 2 else ""
                parts.setdefault(kind, []).append(p)
            for kind, params in parts.items():
                lr = group["lr"] * self.ratio if kind.startswith("out") else group["lr"]
                lr = self.loraplus_lr_embedding if kind.startswith("embedding") else lr
                decay = 0.0 if kind.endswith("1-d") else group.get("weight_decay", 0.0)
                new.append({**group, "params": params, "lr": lr, "weight_decay": decay})
        return new
