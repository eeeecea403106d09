"""How far two models are apart on the same batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rankloom.hf.models import EMBEDDED, known_head
from rankloom.jobs.rundata import judged_records, prepared
from rankloom.microworld import documents
from rankloom.train.config import RunConfig
from rankloom.train.data import Batches

ROWS, LENGTH = 4, 64
ENGLISH = (
    "The harbour wakes before the town does. Long before the bakers open their shutters, the boats have come in with "
    "the tide, and the first crates of herring stand in the cold light on the quay, waiting for the buyers. "
    "By eight o'clock nothing is left of it all but wet stones, a few gulls, and the smell of salt and diesel.",
    "To change a wheel, park on firm, level ground and put on the handbrake. Loosen the nuts by half a turn while the "
    "tyre still touches the road; then raise the car until it turns freely, take off the nuts, and pull the wheel "
    "towards you. Tighten the new one crosswise, first by hand, and once more with the spanner when the car is down.",
    "A glacier is a river of ice that moves under its own weight. Snow that falls on its upper part is pressed, layer "
    "upon layer, until the air is gone from it; what arrives at the bottom decades later carries stones, dust and ash "
    "of years long past. Where more melts than falls, the tongue draws back and leaves bare rock and a grey lake.",
    "Dear Maria, thank you for the book, which came on Tuesday. I have read the first two chapters and do not yet know "
    "whether I like the doctor or mistrust him. Peter says hello; his knee is better, and he wants to walk to the mill "
    "again before the summer is over. Will you come in August as you did last year? The room is yours if you want it.",
)
"""Passages for whoever gives no data: a model of language is to be measured on language."""


@dataclass(frozen=True)
class Difference:
    """Of two outputs: largest absolute difference, ‖a − b‖/‖b‖, and the share of positions with the same best class."""

    largest: float
    relative: float
    same_choice: float


def sample_batch(config: RunConfig, tokenizer: Any, words: int) -> tuple[dict[str, Tensor], str]:
    """Rows of the data where there is some, else of a text that comes along; without a tokenizer random ones of `words`
    tokens. And what they are, in words.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(config.seed)
        ids = torch.randint(0, words, (ROWS, LENGTH), generator=generator)
        said = f"{ROWS} × {LENGTH} random tokens, as the model's folder has no tokenizer"
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, said
    if config.data is not None:
        few = replace(config.data, eval_examples=ROWS)
        records, _ = judged_records(few, config.seed, known_head(config.need_model()))
        rows = Batches(prepared(records, tokenizer, config.data), ROWS, shuffle=False).batch_at(0)
        del rows["labels"]
        return rows, f"{len(rows['input_ids'])} rows of {records.source}"
    own = config.need_model().path == EMBEDDED
    passages = documents("test", ROWS, config.seed) if own else ENGLISH
    coded = tokenizer(list(passages), truncation=True, max_length=LENGTH)["input_ids"]
    ids = torch.tensor([row[: min(map(len, coded))] for row in coded])
    said = "held-out text of its world" if own else "English text that comes along; data=… measures on your own"
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, f"{len(ids)} × {ids.shape[1]} tokens of {said}"


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
