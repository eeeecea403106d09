"""A model packed by a plan's store, as a folder: smaller, to be fine-tuned, merged into or used as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankloom import formats
from rankloom.core.attach import attach
from rankloom.core.prepare import keep_base
from rankloom.core.targets import base_modules
from rankloom.errors import SettingsError
from rankloom.hf.folder import folder_size, model_folder
from rankloom.hf.models import load_model
from rankloom.hf.packed import save_packed
from rankloom.jobs.difference import Difference, difference, output, sample_batch, words_of
from rankloom.jobs.runs import ADAPTER, JobReport, calibration, check_empty, plain
from rankloom.store.footprint import Kept, footprint
from rankloom.train.config import RunConfig


@dataclass(frozen=True)
class QuantizeReport(JobReport):
    """A packed model. `kept`: its tensors by store, `before`: as they were; `error`: its output, with the adapter of
    the plan's start where there is one, against the dense model's; `splits`: by site the errors of the start's iterates
    and the one taken; `size`: bytes of the folder.
    """

    out: Path
    before: tuple[Kept, ...]
    kept: tuple[Kept, ...]
    error: Difference
    measured_on: str
    adapter: Path | None
    splits: dict[str, dict[str, Any]]
    size: int


def quantize_job(config: RunConfig, out: Path) -> QuantizeReport:
    """Pack the model as `config.plan` says and save it, atomically; a plan with a start also saves its adapter, inside.

    Raises:
        SettingsError: the plan has no store, or its start looks at data and there is none.
        FileError: the folder cannot be written, or is there already.
    """
    check_empty(out)
    plan = config.plan
    if plan.store is None:
        raise SettingsError("the plan has no store: plan.store=normal_float, or a method with one: method=loftq bits=2")
    loaded = load_model(config.need_model())
    model, tokenizer = loaded.model, loaded.tokenizer
    batch, measured_on = sample_batch(config, tokenizer, words_of(model, tokenizer))
    before, dense = footprint(model.modules()).rows, output(model, batch)
    splits = {}
    if plan.start is None:
        keep_base(model, plan)
    else:
        bank = attach(model, plan, config.name, calibration=calibration(config, tokenizer))
        splits = {site: plain(started) for site, started in bank.started[config.name].items()}
    error = difference(output(model, batch), dense)
    with model_folder(out) as hidden:
        save_packed(model, tokenizer, hidden)
        if splits:
            model.name_or_path = str(out)
            formats.save(model, hidden / ADAPTER, config.name)
        size = folder_size(hidden)
    return QuantizeReport(
        out=out,
        before=before,
        kept=footprint(module for _, module in base_modules(model)).rows,
        error=error,
        measured_on=measured_on,
        adapter=out / ADAPTER if splits else None,
        splits=splits,
        size=size,
    )
