"""Folding an adapter into its model for good: file by file into the dense base, or into the packed one.

The error of the merged model is measured against the unmerged one; one model at a time is in memory.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rankloom import formats
from rankloom.core.attach import detach
from rankloom.core.bank import Bank
from rankloom.core.plan import Plan
from rankloom.errors import SettingsError, StateError
from rankloom.formats.folds import Folds
from rankloom.formats.loading import kept_plan
from rankloom.formats.manifest import open_folder
from rankloom.hf.folder import folder_size, model_folder
from rankloom.hf.models import Loaded, find_tokenizer, load_weights, model_files, quiet, skeleton
from rankloom.hf.packed import save_packed
from rankloom.hf.shards import Shards, hang, has_shards, merged, write_shards
from rankloom.jobs.difference import Difference, difference, output, sample_batch, words_of
from rankloom.jobs.runs import JobReport, check_empty, known_labels, on_its_base
from rankloom.store.base import Packed
from rankloom.store.model import unpack
from rankloom.train.config import ModelSettings, RunConfig

Into = Literal["16bit", "store"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest relative error of a merge, by dtype of the base."""


@dataclass(frozen=True)
class MergeReport(JobReport):
    """A merged model. `error`: read back from its files, against the adapter on the same base (None: not verified);
    `trained`: against the adapter on the packed base that it was trained on, where the merge is into another; `change`:
    the base against the adapter, for a measure; `lost`: by packed weight, the part of its change that rounding lost;
    `how`: file by file, or why in memory; `measured_on`: the batch; `size`: bytes of the folder.
    """

    out: Path
    adapter: Path
    into: Into
    error: Difference | None
    trained: Difference | None
    change: Difference | None
    lost: dict[str, float]
    how: str
    measured_on: str
    size: int


def merge_job(
    config: RunConfig,
    adapter: Path,
    out: Path,
    tolerance: float | None = None,
    into: Into = "16bit",
    verify: bool = True,
) -> MergeReport:
    """Fold the adapter into the model and save it as a model's folder, atomically.

    Args:
        config: model, the adapter's name, and data to measure on (a text that comes along where there is none).
        tolerance: largest relative error against the adapter on the same base; by default 1e-3 in float32, 2e-2 in
            float16, 5e-2 in bfloat16, and into the store half of what the adapter itself changes.
        into: "16bit": the base as its files have it (in their dtype), packed weights made dense; "store": the packed
            base.
        verify: measure, which loads one model after the other; without it none is loaded whole where `how` says so.

    Raises:
        NotMergeable: the change has no single matrix; nothing is written.
        StateError: the error is above the tolerance; nothing is written.
        FileError: the folder cannot be written, or is there already.
    """
    check_empty(out)
    config = on_its_base(config, adapter)
    if into not in ("16bit", "store"):
        raise SettingsError(f"into={into!r}: '16bit' or 'store'")
    other_base = into == "16bit" and _packs_on_loading(config, adapter)
    settings = config.need_model()
    bare, tokenizer = skeleton(settings, labels=known_labels(config)).model, find_tokenizer(settings)
    batch, measured_on = sample_batch(config, tokenizer, words_of(bare, tokenizer))
    spoken = _spoken(config, adapter, batch, pack=not other_base) if verify else None
    trained = _spoken(config, adapter, batch, pack=True) if verify and other_base else None
    with model_folder(out) as hidden:
        if into == "store":
            written = _into_store(config, adapter, hidden)
        else:
            written = _into_dense(config, adapter, hidden, pack=not other_base)
        said = _read_back(config, hidden, batch) if verify else None
        if said is not None and spoken is not None:
            _check(difference(said, spoken.adapted), spoken, written, tolerance)
        size = folder_size(hidden)
    return MergeReport(
        out=out,
        adapter=adapter,
        into=into,
        error=None if said is None or spoken is None else difference(said, spoken.adapted),
        trained=None if said is None or trained is None else difference(said, trained.adapted),
        change=None if spoken is None else difference(spoken.base, spoken.adapted),
        lost=written.lost,
        how=written.how,
        measured_on=measured_on if verify else "not measured",
        size=size,
    )


@dataclass(frozen=True)
class _Spoken:
    """What a model says to the batch with its adapter and without."""

    adapted: Tensor
    base: Tensor


@dataclass(frozen=True)
class _Written:
    """How a model was written, in which dtype (None: packed), and what packed weights lost of their change."""

    how: str
    dtype: torch.dtype | None
    lost: dict[str, float] = field(default_factory=dict)


def _spoken(config: RunConfig, adapter: Path, batch: dict[str, Tensor], pack: bool) -> _Spoken:
    loaded = load_weights(config.need_model(), labels=known_labels(config))
    bank = formats.load(loaded.model, adapter, config.name, pack=pack)
    with bank.using(config.name):
        adapted = output(loaded.model, batch)
    with bank.using():
        return _Spoken(adapted, output(loaded.model, batch))


def _packs_on_loading(config: RunConfig, adapter: Path) -> bool:
    """Whether loading the adapter would pack a dense base."""
    with open_folder(adapter) as source:
        plan = kept_plan(source)
    if plan is None or plan.store is None or plan.start is not None:
        return False
    model = skeleton(config.need_model(), labels=known_labels(config)).model
    return not any(isinstance(parameter, Packed) for parameter in model.parameters())


def _into_dense(config: RunConfig, adapter: Path, hidden: Path, pack: bool) -> _Written:
    """Write the merged model: file by file where every weight lies in a file under its own name."""
    settings = config.need_model()
    bare = skeleton(settings, labels=known_labels(config))
    files = model_files(settings)
    with open_folder(adapter) as source:
        why = _why_whole(kept_plan(source), files, folded=Folds.of(source) is not None)
    if not why:
        shards = Shards(files)
        dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
        missing = hang(bare.model, shards, dtype)
        bank = formats.load(bare.model, adapter, config.name, pack=pack)
        why = _why_tied(bank, config.name, set(missing))
        if not why:
            write_shards(hidden, merged(bank, config.name, shards, dtype))
            written = dtype or shards.tensor(shards.names[0]).dtype
            _write_about(bare, settings, files, written, hidden)
            return _Written("file by file, one layer in memory", written)
    return _Written(f"in memory: {why}", _in_memory(config, adapter, hidden, pack))


def _why_whole(plan: Plan | None, files: Path, folded: bool) -> str:
    """Why the model must be in memory to be merged; "" where it need not."""
    if folded:
        return "changes were folded into its base"
    if plan is not None and plan.layer_replication:
        return "its layers are replicated"
    return "" if has_shards(files) else "the weights are in no safetensors file"


def _why_tied(bank: Bank, name: str, missing: set[str]) -> str:
    """Why these adapters cannot be merged layer by layer: a weight without a file, or one that other layers use too."""
    owners: dict[int, set[str]] = {}
    for path, parameter in bank.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(path)
    for site in bank.sites(name):
        for key, tensor in site.layer._parameters.items():
            if tensor is not None and (f"{site.path}.{key}" in missing or len(owners[id(tensor)]) > 1):
                return f"{site.path}.{key} is tied, or in no file under that name"
    return ""


def _in_memory(config: RunConfig, adapter: Path, hidden: Path, pack: bool) -> torch.dtype:
    loaded = load_weights(config.need_model(), labels=known_labels(config))
    model = loaded.model
    formats.load(model, adapter, config.name, pack=pack).fold(config.name, into="dense")
    detach(model)
    unpack(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False
    with quiet():
        model.save_pretrained(hidden)
        _copy_tokenizer(config.need_model(), hidden)
    dtype: torch.dtype = model.dtype
    return dtype


def _into_store(config: RunConfig, adapter: Path, hidden: Path) -> _Written:
    """Write the packed model with the adapter in it."""
    loaded = load_weights(config.need_model(), labels=known_labels(config))
    bank = formats.load(loaded.model, adapter, config.name)
    if not any(isinstance(parameter, Packed) for parameter in loaded.model.parameters()):
        raise StateError(
            "into='store': this base is not packed; give the folder of a packed model, or an adapter that was trained "
            "with a store in its plan; or merge into='16bit'"
        )
    lost = bank.merge(config.name, into="store")
    save_packed(loaded.model, find_tokenizer(config.need_model()), hidden)
    return _Written("in memory, packed", None, lost)


def _write_about(bare: Loaded, settings: ModelSettings, files: Path, dtype: torch.dtype, hidden: Path) -> None:
    """Configuration and tokenizer beside merged weights."""
    bare.model.config.dtype = dtype
    bare.model.config.save_pretrained(hidden)
    generation = files / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, hidden / generation.name)
    _copy_tokenizer(settings, hidden)


def _copy_tokenizer(settings: ModelSettings, hidden: Path) -> None:
    """The model's tokenizer beside it, if it has one."""
    tokenizer = find_tokenizer(settings)
    if tokenizer is not None:
        tokenizer.save_pretrained(hidden)


def _read_back(config: RunConfig, folder: Path, batch: dict[str, Tensor]) -> Tensor:
    settings = replace(config.need_model(), path=str(folder), revision=None)
    return output(load_weights(settings, labels=known_labels(config)).model, batch)


def _check(found: Difference, spoken: _Spoken, written: _Written, tolerance: float | None) -> None:
    what, remedy = f"for {written.dtype}", "merge with model.dtype=float32"
    most = TOLERANCE.get(written.dtype, 1e-3) if written.dtype is not None else 0.0
    if written.dtype is None:
        most = difference(spoken.base, spoken.adapted).relative / 2
        what, remedy = "half of what the adapter itself changes", "merge into='16bit'"
    most = most if tolerance is None else tolerance
    if not found.relative <= most:
        raise StateError(
            f"the merged model, read back from its files, differs from the unmerged by {found.relative:.2e} relative "
            f"(at most {most:.2g}, {what}); {remedy}, or accept it with --tolerance. Nothing was written"
        )
