"""Folding an adapter into its model for good, with the error measured: in memory, and again after reading it back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankloom import formats
from rankloom.core.attach import detach
from rankloom.errors import StateError
from rankloom.files import disk
from rankloom.files.folders import drop, hidden_beside, make_parents, put
from rankloom.hf.job import check_out, known_labels, plain, writing
from rankloom.hf.models import Loaded, load_model, quiet
from rankloom.hf.rundata import judged_records, prepared
from rankloom.train.config import RunConfig
from rankloom.train.data import Batches

ROWS, LENGTH = 4, 32
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a merge, by dtype of the base."""


@dataclass(frozen=True)
class Difference:
    """Of two outputs: largest absolute difference, ‖a − b‖/‖b‖, and the share of positions with the same best class."""

    largest: float
    relative: float
    same_choice: float


@dataclass(frozen=True)
class MergeReport:
    """A merged model. `merged`: adapter on top against folded in; `saved`: against the model read back from the folder;
    `measured_on`: the batch; `size`: bytes of the folder.
    """

    out: Path
    adapter: Path
    merged: Difference
    saved: Difference
    measured_on: str
    size: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        found: dict[str, Any] = plain(self)
        return found


def merge_job(config: RunConfig, adapter: Path, out: Path, tolerance: float | None = None) -> MergeReport:
    """Fold the adapter into the model and save it as a plain Hugging Face folder, atomically.

    Args:
        config: model, the adapter's name, and data to measure on (random tokens where there is none).
        tolerance: largest relative error; by default 1e-3 in float32, 2e-2 in float16, 5e-2 in bfloat16.

    Raises:
        NotMergeable: the change has no single matrix; nothing is written.
        StateError: the error is above the tolerance; nothing is written.
        FileError: the folder cannot be written, or is there already.
    """
    check_out(out, False)
    if out.exists() and any(out.iterdir()):
        raise StateError(f"{out} is not empty: a merged model gets a folder of its own; give another --out")
    loaded = load_model(config.need_model(), labels=known_labels(config))
    model = loaded.model
    bank = formats.load(model, adapter, config.name)
    bank.use(config.name)
    batch, measured_on = sample_batch(config, loaded)
    unmerged = output(model, batch)
    bank.fold(config.name)
    detach(model)
    _part_ties(model)
    merged = difference(output(model, batch), unmerged)
    most = TOLERANCE.get(model.dtype, 1e-3) if tolerance is None else tolerance
    _check(merged, most, "folded in", model.dtype)
    hidden = hidden_beside(out.absolute())
    with writing(out):
        try:
            make_parents(hidden)
            disk.make(hidden)
            with quiet():
                model.save_pretrained(hidden)
                loaded.tokenizer.save_pretrained(hidden)
            saved = difference(_read_back(config, hidden, loaded, batch), unmerged)
            _check(saved, most, "read back from its files", model.dtype)
            size = _sync(hidden)
            put(hidden, out.absolute())
        finally:
            drop(hidden)
    return MergeReport(out, adapter, merged, saved, measured_on, size)


def sample_batch(config: RunConfig, loaded: Loaded) -> tuple[dict[str, Tensor], str]:
    """Rows of the data where there is some, else random tokens."""
    device = loaded.model.device
    if config.data is not None:
        records = judged_records(replace(config.data, eval_examples=ROWS), config.seed)
        rows = Batches(prepared(records, loaded.tokenizer, config.data), ROWS, shuffle=False).batch_at(0)
        del rows["labels"]
        return {k: v.to(device) for k, v in rows.items()}, f"{len(rows['input_ids'])} rows of {records.source}"
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(0, len(loaded.tokenizer), (ROWS, LENGTH), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, f"{ROWS}×{LENGTH} random tokens"


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or hidden states where the model has no head, in float32 on the CPU; padding left out."""
    model.eval()
    with torch.no_grad():
        out = model(**batch)
    values: Tensor = out["logits"] if "logits" in out else out[0]
    values = values.float().cpu()
    return values[batch["attention_mask"].bool().cpu()] if values.ndim == 3 else values


def difference(a: Tensor, b: Tensor) -> Difference:
    """How far two outputs (…, classes) are apart."""
    return Difference(
        largest=float((a - b).abs().max()),
        relative=float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp_min(1e-30)),
        same_choice=float((a.argmax(-1) == b.argmax(-1)).float().mean()),
    )


def _check(found: Difference, most: float, what: str, dtype: torch.dtype) -> None:
    if not found.relative <= most:
        raise StateError(
            f"the merged model, {what}, differs from the unmerged by {found.relative:.2e} relative (at most {most:.0e} "
            f"for {dtype}); merge into model.dtype=float32, or accept it with --tolerance. Nothing was written"
        )


def _part_ties(model: Any) -> None:
    """Embeddings that came apart in the merge are saved apart."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def _read_back(config: RunConfig, folder: Path, loaded: Loaded, batch: dict[str, Tensor]) -> Tensor:
    settings = replace(config.need_model(), path=str(folder), task=loaded.task, revision=None)
    return output(load_model(settings).model, batch)


def _sync(folder: Path) -> int:
    """Force every file to disk; the bytes of all."""
    size = 0
    for path in folder.iterdir():
        disk.sync(path)
        size += path.stat().st_size
    disk.sync(folder)
    return size
