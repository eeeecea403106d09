"""Row 5: a wrong base is refused, by both fingerprints; the same base is not, whatever it was cast to."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rankloom as rl
from rankloom.core import fingerprint
from rankloom.errors import FileError
from rankloom.formats import basecheck
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform
from reliability_board.board import Budget, Finding, Row, Sabotage, swapped
from reliability_board.files.world import adapted, base, folder, silent

Make = Callable[[], nn.Module]


def measure(budget: Budget) -> Finding:
    """An adapter of one base, loaded into 22 others, into the same base, and into the same base re-cast."""
    faults = []
    with folder() as root, silent():
        rl.save(adapted(base()), root / "a")
        for name, make in wrong().items():
            fault = _refused(make(), root / "a")
            if fault:
                faults.append(f"{name}: {fault}")
        for name, make in right().items():
            try:
                rl.load(make(), root / "a")
            except FileError as error:
                faults.append(f"{name}: refused: {error}")
        if not _override_is_logged(root / "a"):
            faults.append("base_check=False leaves no line in the log")
        if _unknown_is_let_in(root / "a"):
            faults.append("unknown_base='refuse' lets a folder without fingerprint in")
    figure = f"{len(wrong())} wrong bases and {len(right())} right ones; {len(faults)} taken for the other"
    return Finding(not faults, figure, tuple(faults))


def wrong() -> dict[str, Make]:
    """Bases that the adapter was not made on."""
    return {
        "other weights": lambda: base(seed=7),
        "one MLP matrix 1 % larger": lambda: _edited("model.layers.1.mlp.up_proj.weight", lambda w: w * 1.01),
        "one attention matrix 1 % larger": lambda: _edited(
            "model.layers.0.self_attn.o_proj.weight", lambda w: w * 1.01
        ),
        "one norm 1 % larger": lambda: _edited("model.norm.weight", lambda w: w * 1.01),
        "one matrix transposed": lambda: _edited("model.layers.0.self_attn.k_proj.weight", lambda w: w.T.clone()),
        "two layers swapped": _swapped_layers,
        "embeddings with noise": lambda: _edited(
            "model.embed_tokens.weight", lambda w: w + 0.002 * torch.randn_like(w)
        ),
        "one layer": lambda: base(num_hidden_layers=1),
        "three layers": lambda: base(num_hidden_layers=3),
        "four layers": lambda: base(num_hidden_layers=4),
        "a larger vocabulary": lambda: base(vocab_size=65),
        "a smaller vocabulary": lambda: base(vocab_size=60),
        "another MLP width": lambda: base(intermediate_size=64),
        "another hidden size": lambda: base(hidden_size=64),
        "twice the heads": lambda: base(num_attention_heads=8, num_key_value_heads=8),
        "half the heads": lambda: base(num_attention_heads=2, num_key_value_heads=2),
        "another rope base": lambda: base(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        "another norm epsilon": lambda: base(rms_norm_eps=1e-3),
        "another activation": lambda: base(hidden_act="gelu"),
        "another architecture": _mistral,
        "merged with an adapter": _merged,
        "quantised": _quantised,
        "quantised in place": lambda: _edited_all(Uniform(bits=8, group=16)),
    }


def right() -> dict[str, Make]:
    """The same base, as loaded and re-cast."""
    casts = (torch.bfloat16, torch.float16, torch.float64)
    found: dict[str, Make] = {"the same base": base}
    for dtype in casts:
        found[f"the same base in {dtype}"] = lambda dtype=dtype: base().to(dtype)  # type: ignore[misc]
        found[f"the same base through {dtype}"] = lambda dtype=dtype: base().to(dtype).float()  # type: ignore[misc]
    found["the same base under another name"] = lambda: _named(base())
    found["the same base with another adapter"] = lambda: adapted(base(), "other")
    return found


def _refused(model: nn.Module, place: Path) -> str | None:
    try:
        rl.load(model, place)
    except FileError as error:
        named = "Its base:" in str(error) and "this model:" in str(error)
        shaped = "adapter_" in str(error) and ("shape" in str(error) or "module" in str(error))
        return None if named or shaped else f"refused without saying which: {error}"
    return "loaded"


def _edited(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    model = base()
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(3)
        parameter = model.get_parameter(name)
        parameter.copy_(change(parameter))
    return model


def _edited_all(store: Any) -> nn.Module:
    model = base()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(store.round_trip(parameter))
    return model


def _swapped_layers() -> nn.Module:
    model: Any = base()
    first, second = copy.deepcopy(model.model.layers[0].state_dict()), model.model.layers[1].state_dict()
    model.model.layers[0].load_state_dict(second)
    model.model.layers[1].load_state_dict(first)
    return model  # type: ignore[no-any-return]


def _mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    like: Any = base()
    settings = {k: v for k, v in like.config.to_dict().items() if k in MistralConfig().to_dict() and k != "model_type"}
    model = MistralForCausalLM(MistralConfig(**settings)).eval()
    model.load_state_dict(like.state_dict())
    return model  # type: ignore[no-any-return]


def _merged() -> nn.Module:
    model: Any = adapted(base(), "m")
    model.rankloom.fold("m")
    rl.detach(model)
    return model  # type: ignore[no-any-return]


def _quantised() -> nn.Module:
    model = base()
    keep(model, {name: NormalFloat() for name, p in model.named_parameters() if "proj" in name})
    return model


def _named(model: Any) -> nn.Module:
    model.name_or_path = model.config._name_or_path = "another/name"
    return model  # type: ignore[no-any-return]


def _override_is_logged(place: Path) -> bool:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    basecheck.LOG.addHandler(handler)
    try:
        rl.load(base(seed=7), place, base_check=False)
    finally:
        basecheck.LOG.removeHandler(handler)
    return any("base_check=False" in line for line in lines)


def _unknown_is_let_in(place: Path) -> bool:
    with folder() as root:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (root / name).write_bytes((place / name).read_bytes())
        try:
            rl.load(base(), root, unknown_base="refuse")
        except FileError:
            return False
    return True


def _nothing(sketch: str) -> torch.Tensor:
    return torch.zeros_like(_numbers(sketch))


_numbers = fingerprint._numbers
ROW = Row(
    5,
    "a wrong base is refused",
    measure,
    (
        Sabotage("only structure is compared", lambda: swapped(fingerprint, "_numbers", _nothing)),
        Sabotage("contents may differ by 5 %", lambda: swapped(fingerprint, "SAME", 0.05)),
        Sabotage("re-casting is not tolerated", lambda: swapped(fingerprint, "RECAST", 1e-5)),
        Sabotage("config fields do not count", lambda: swapped(fingerprint, "NEUTRAL", re.compile(".*"))),
    ),
)
