"""Settings of one training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rankloom.errors import SettingsError, suggest

OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains; what it trains is the model's business, and what it adds to gradient descent the rules'.

    - `steps`: optimizer steps; `lr`: peak rate; `weight_decay`, `betas`, `eps`: of AdamW.
    - `optimizer`: AdamW with moments in float32 beside the weights, in 8 bits (bitsandbytes), in host memory paged in
      by need, or both.
    - `schedule`: of the rate after the warm-up, down to 0 (`constant`: none); the warm-up is linear, `warmup_steps`
      long or `warmup_ratio` of all steps.
    - `accumulate`: batches per step and process; `clip`: largest norm of all gradients together (None: never clipped).
    - `precision`: autocast of forward and loss; adapters stay float32. `"fp16"` scales the loss and skips overflows.
    - `gradient_checkpointing`: recompute activations in the backward pass; the model must offer it.
    - `chunked_loss`: tokens at a time for the head and cross entropy of a causal language model, so that the logits of
      a long vocabulary are never whole in memory; the loss stays the same (None: all at once).
    - `sharding`: of the frozen base over several processes: `"none"`, each holds all of it; `"fsdp"`, each holds a part
      (FSDP2) and adapters are whole everywhere.
    - `eval_every`, `save_every`: in steps (None: only before and after, only at the end).
    - `keep`: newest checkpoints kept, 2 or more; the best one is kept besides. `patience`: evaluations without a lower
      loss until the run stops. `end_with`: the weights that the model has in the end, the last or those with the lowest
      eval loss.
    - `seed`: of python, numpy and torch at the start (None: left as they are).
    - `log_every`: steps between rows in metrics.jsonl; `report_to`: trackers by name.
    - `dead_gradients`: what happens when a trainable tensor has no gradient in the first step.
    """

    steps: int = 200
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    accumulate: int = 1
    clip: float | None = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    chunked_loss: int | None = None
    sharding: Literal["none", "fsdp"] = "none"
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    patience: int | None = None
    end_with: Literal["last", "best"] = "last"
    seed: int | None = 0
    log_every: int = 10
    report_to: str | tuple[str, ...] = ()
    dead_gradients: Literal["error", "warn"] = "error"

    def __post_init__(self) -> None:
        counts = ("steps", "accumulate", "keep", "log_every", "eval_every", "save_every", "patience", "chunked_loss")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name}={value}: 1 or more")
        if self.keep < 2:
            raise SettingsError("keep=1: 2 or more, so that one is left if the newest is damaged")
        for name in ("lr", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise SettingsError(f"{name}={value}: a positive number" + (", or None" if name == "clip" else ""))
        if not 0 <= self.weight_decay < math.inf or not all(0 <= b < 1 for b in self.betas):
            raise SettingsError(f"weight_decay={self.weight_decay}, betas={self.betas}: out of range")
        if self.warmup_steps and self.warmup_ratio:
            raise SettingsError("warmup_steps and warmup_ratio say the same thing: give one of them")
        if not 0 <= self.warmup < self.steps:
            raise SettingsError(f"a warm-up of {self.warmup} steps does not fit into steps={self.steps}")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", ("cosine", "linear", "constant")),
            ("precision", ("no", "bf16", "fp16")),
            ("sharding", ("none", "fsdp")),
            ("end_with", ("last", "best")),
            ("dead_gradients", ("error", "warn")),
        ):
            one_of(name, getattr(self, name), known)
        for tracker in self.trackers:
            one_of("report_to", tracker, TRACKERS)

    @property
    def warmup(self) -> int:
        """Length of the warm-up in steps."""
        return self.warmup_steps or round(self.warmup_ratio * self.steps)

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers; `"none"` and `""` mean none."""
        names = (self.report_to,) if isinstance(self.report_to, str) else self.report_to
        return tuple(dict.fromkeys(n for n in names if n not in ("", "none")))


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a value that is not among the known ones."""
    if value not in known:
        raise SettingsError(f"{name}={value!r}: one of {', '.join(map(repr, known))}{suggest(str(value), known)}")
