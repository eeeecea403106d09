"""Who else can load a saved adapter, and why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rankloom.formats.vllm import KINDS, SERVED

VLLM_RANK = 512
VLLM_DEFAULT_RANK = 16


@dataclass(frozen=True)
class Verdict:
    """`ok`, and the reasons against it or the hint that goes with it."""

    ok: bool
    why: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = "; ".join(self.why[:3]) + (f" and {len(self.why) - 3} more" if len(self.why) > 3 else "")
        return ("yes" if self.ok else "no") + (f" ({shown})" if self.why else "")


@dataclass(frozen=True)
class Compat:
    """Verdicts for PEFT and vLLM; as text one line."""

    peft: Verdict
    vllm: Verdict

    def __str__(self) -> str:
        return f"PEFT: {self.peft} · vLLM: {self.vllm}"


_VLLM: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "DoRA": lambda c: bool(c.get("use_dora")),
    "modules_to_save": lambda c: bool(c.get("modules_to_save")),
    "trained biases": lambda c: c.get("bias", "none") != "none",
    "lora_bias": lambda c: bool(c.get("lora_bias")),
    "trained token rows": lambda c: bool(c.get("trainable_token_indices")),
    "rank_pattern or alpha_pattern": lambda c: bool(c.get("rank_pattern") or c.get("alpha_pattern")),
    "layer_replication": lambda c: bool(c.get("layer_replication")),
    "target_parameters": lambda c: bool(c.get("target_parameters")),
    f"rank above {VLLM_RANK}": lambda c: c.get("r", 8) > VLLM_RANK,
}


def compat(config: Mapping[str, Any], kinds: set[str], problems: list[str], model: str) -> Compat:
    """The verdicts for a written config, the kinds of its sites, the reasons why PEFT could not hold it, and the name
    of the model's class.
    """
    peft = Verdict(not problems, tuple(problems))
    if problems or config["peft_type"] != "LORA":
        return Compat(peft, Verdict(False, (f"it loads LORA only, this is {config['peft_type']}",)))
    against = [name for name, holds in _VLLM.items() if holds(config)]
    against += [f"{kind} targets" for kind in sorted(kinds - KINDS)]
    against += [] if model in SERVED else [f"it serves no {model} with adapters"]
    if against:
        return Compat(peft, Verdict(False, tuple(against)))
    rank = config.get("r", 8)
    return Compat(peft, Verdict(True, (f"start it with --max-lora-rank {rank}",) if rank > VLLM_DEFAULT_RANK else ()))
