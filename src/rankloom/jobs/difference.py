"""How far two models are apart on the same batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rankloom.hf.models import known_head
from rankloom.jobs.rundata import judged_records, prepared
from rankloom.train.config import RunConfig
from rankloom.train.data import Batches

ROWS, LENGTH = 4, 32


@dataclass(frozen=True)
class Difference:
    """Of two outputs: largest absolute difference, ‖a − b‖/‖b‖, and the share of positions with the same best class."""

    largest: float
    relative: float
    same_choice: float


def sample_batch(config: RunConfig, tokenizer: Any, words: int) -> tuple[dict[str, Tensor], str]:
    """Rows of the data where there is some and a tokenizer, else random ones of `words` tokens; and what they are, in
    words.
    """
    if config.data is not None and tokenizer is not None:
        few = replace(config.data, eval_examples=ROWS)
        records, _ = judged_records(few, config.seed, known_head(config.need_model()))
        rows = Batches(prepared(records, tokenizer, config.data), ROWS, shuffle=False).batch_at(0)
        del rows["labels"]
        return rows, f"{len(rows['input_ids'])} rows of {records.source}"
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(0, words, (ROWS, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, f"{ROWS}×{LENGTH} random tokens"


def words_of(model: Any, tokenizer: Any) -> int:
    """How many tokens there are to draw from: those of the tokenizer, else the rows of the input embedding."""
    if tokenizer is not None:
        return len(tokenizer)
    return int(model.get_input_embeddings().weight.shape[0])


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states where the model has no head, in float32 on the CPU; padding left out."""
    model.eval()
    with torch.no_grad():
        out = model(**{key: value.to(model.device) for key, value in batch.items()})
    values: Tensor = out["logits"] if "logits" in out else out[0]
    values = values.float().cpu()
    return values[batch["attention_mask"].bool()] if values.ndim == 3 else values


def difference(a: Tensor, b: Tensor) -> Difference:
    """How far two outputs (…, classes) are apart."""
    return Difference(
        largest=float((a - b).abs().max()),
        relative=float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30)),
        same_choice=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
    )
