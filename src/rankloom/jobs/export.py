"""An adapter as another kind of file, with the error stated in weights and in outputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankloom import formats
from rankloom.files.folders import writing
from rankloom.formats.saving import SaveReport
from rankloom.hf.models import find_tokenizer, load_weights
from rankloom.jobs.difference import Difference, difference, output, sample_batch, words_of
from rankloom.jobs.runs import JobReport, check_empty, known_labels, on_its_base
from rankloom.train.config import RunConfig


@dataclass(frozen=True)
class ExportedReport(JobReport):
    """`errors`: ‖ΔW − B A‖_F / ‖ΔW‖_F by site, `error` that of all together; `outputs`: what the model says with the
    written adapter, read back, against what it says with the first one; `change`: the bare model against that.
    """

    error: float
    errors: dict[str, float]
    outputs: Difference
    change: Difference
    measured_on: str
    saved: SaveReport


def export_job(config: RunConfig, adapter: Path, out: Path, as_: str = "lora", r: int | None = None) -> ExportedReport:
    """Write the adapter as another kind of file: `as_="lora"` is a LoRA of rank `r` at most. It is read back, on a base
    that is loaded anew, and measured on `config.data`, or on a text that comes along.

    Raises:
        NotMergeable: the change has no matrix.
        StateError: the folder is not empty.
    """
    check_empty(out, "an adapter")
    config = on_its_base(config, adapter)
    settings, labels = config.need_model(), known_labels(config)
    model, tokenizer = load_weights(settings, labels=labels).model, find_tokenizer(settings)
    formats.load(model, adapter, config.name).use(config.name)
    batch, measured_on = sample_batch(config, tokenizer, words_of(model, tokenizer))
    adapted = output(model, batch)
    with writing(out):
        found = formats.export(model, out, config.name, as_=as_, r=r)
    del model
    fresh = load_weights(settings, labels=labels).model
    bare = output(fresh, batch)
    formats.load(fresh, out, config.name).use(config.name)
    return ExportedReport(
        error=found.error,
        errors=found.errors,
        outputs=difference(output(fresh, batch), adapted),
        change=difference(bare, adapted),
        measured_on=measured_on,
        saved=found.saved,
    )
