"""Settings of one training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rankloom.errors import SettingsError
from rankloom.settings import Count, NotNegative, Positive, Probability, Seed, Settings, Steps, Within

SAVES, SAVE_SECONDS = 10, 600.0
"""Without `save_every`: checkpoints of a run at least, and seconds between two of them at most."""
Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow", "none", ""]


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How a run trains; what it trains is the model's business, and what it adds to gradient descent the rules'.

    - `steps`: optimizer steps; `lr`: peak rate; `weight_decay`, `betas`, `eps`: of AdamW.
    - `optimizer`: AdamW with moments in float32 beside the weights, in 8 bits (bitsandbytes), in host memory paged in
      by need, or both.
    - `schedule`: of the rate after the warm-up, down to 0 (`constant`: none); `warmup_steps`, `warmup_ratio`: length of
      the linear warm-up, in steps or as a part of all of them.
    - `accumulate`: batches per step and process; `clip`: largest norm of all gradients together (None: never clipped).
    - `precision`: autocast of forward and loss; adapters stay float32. `"fp16"` scales the loss and skips overflows.
    - `gradient_checkpointing`: recompute activations in the backward pass; the model must offer it.
    - `chunked_loss`: tokens at a time for the head and cross entropy of a causal language model, so that the logits of
      a long vocabulary are never whole in memory; the loss stays the same (None: all at once).
    - `sharding`: of the frozen base over several processes: `"none"`, each holds all of it; `"fsdp"`, each holds a part
      (FSDP2) and adapters are whole everywhere.
    - `context`: columns of a batch that gates are told, as `rankloom.fit` says.
    - `eval_every`: in steps (None: only before and after). `save_every`: steps between checkpoints; None: a tenth of
      all steps or ten minutes, whichever is over first. A run without `out` keeps none.
    - `keep`: newest checkpoints kept, 2 or more; the best one is kept besides. `patience`: evaluations without a lower
      loss until the run stops. `end_with`: the weights that the model has in the end, the last or those with the lowest
      eval loss.
    - `seed`: of python, numpy and torch at the start (None: left as they are).
    - `log_every`: steps between rows in metrics.jsonl; `report_to`: trackers by name.
    - `dead_gradients`: what happens when a trainable tensor has no gradient in any of the first 20 steps.
    """

    steps: Count = 200
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.0
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: Positive = 1e-8
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Steps = 0
    warmup_ratio: Probability = 0.0
    accumulate: Count = 1
    clip: Positive | None = 1.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    chunked_loss: Count | None = None
    sharding: Literal["none", "fsdp"] = "none"
    context: tuple[str, ...] = ()
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Annotated[int, Within(2, 1 << 31)] = 2
    patience: Count | None = None
    end_with: Literal["last", "best"] = "last"
    seed: Seed | None = 0
    log_every: Count = 10
    report_to: Tracker | tuple[Tracker, ...] = ()
    dead_gradients: Literal["error", "warn"] = "error"

    def __post_init__(self) -> None:
        if self.warmup_steps and self.warmup_ratio:
            raise SettingsError("warmup_steps and warmup_ratio say the same thing: give one of them")
        if self.warmup >= self.steps:
            raise SettingsError(f"a warm-up of {self.warmup} steps does not fit into steps={self.steps}")

    @property
    def warmup(self) -> int:
        """Length of the warm-up in steps."""
        return self.warmup_steps or round(self.warmup_ratio * self.steps)

    @property
    def save_steps(self) -> int:
        """Steps between checkpoints, as given or a tenth of all."""
        return self.save_every or -(-self.steps // SAVES)

    @property
    def save_seconds(self) -> float | None:
        """Seconds after which a checkpoint is due all the same; None where `save_every` says when."""
        return SAVE_SECONDS if self.save_every is None else None

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers; `"none"` and `""` mean none."""
        names = (self.report_to,) if isinstance(self.report_to, str) else self.report_to
        return tuple(dict.fromkeys(n for n in names if n not in ("", "none")))
