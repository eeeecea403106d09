"""What PEFT (0.21) does to a model or a config before it adapts anything, and why its answer is another one then."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

from torch import nn

from rankloom.core.site import Site
from rankloom.core.slots import unseen_by_calls
from rankloom.formats.view import View, attention_of

FUSED: Mapping[str, frozenset[str]] = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""Family of mixtures → the names that PEFT takes, in any target, for the experts of before transformers 5."""
MAMBAS = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
NO_MAMBA = frozenset({"conv1d", "out_proj"})
"""Names that PEFT refuses in these models, for the types that are like LoRA."""
LIKE_LORA = frozenset({"ADALORA", "LORA"})


def rewritten(model: nn.Module, peft_type: str) -> frozenset[str]:
    """The last names that PEFT turns into fused experts wherever they are targeted; where there are some, it also takes
    an expression for the last names that it hits.
    """
    table = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", None)
    if table is None or peft_type != "LORA":
        return frozenset()
    kind = _model_type(model)
    return FUSED.get({**table, "mixtral": "mixtral"}.get(kind, ""), frozenset())


def model_problems(view: View, peft_type: str) -> Iterator[str]:
    """Why PEFT would adapt other places than those of a view."""
    names, kind = rewritten(view.model, peft_type), _model_type(view.model)
    refused = NO_MAMBA if kind in MAMBAS and peft_type in LIKE_LORA else frozenset()
    parents = _parents(view)
    for site, _ in view.adapted:
        last = site.path.rpartition(".")[2]
        if not site.bare and last in names:
            yield f"PEFT takes {last!r} of a {kind} for its fused experts ({site.name})"
        if not site.bare and last in refused:
            yield f"PEFT refuses {last!r} in a {kind} ({site.name})"
        if _silent(site, view):
            yield f"PEFT adapts only where a module is called, and here its weight is read ({site.name})"
    for site in view.sites:
        if len(parents.get(id(site.layer), ())) > 1:
            yield f"the layer {site.path!r} has more than one name, and PEFT adapts it under one of them"


def _silent(site: Site, view: View) -> bool:
    return attention_of(site, view.modules) is None and unseen_by_calls(site.layer, site.slot)


def _parents(view: View) -> dict[int, set[tuple[int, str]]]:
    """Where each module hangs: (its parent, its name there), the same parent counted once."""
    found: dict[int, set[tuple[int, str]]] = {}
    for path, module in view.modules.items():
        above, _, name = path.rpartition(".")
        if path:
            found.setdefault(id(module), set()).add((id(view.modules[above]), name))
    return found


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))
