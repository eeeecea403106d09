"""The main job: config → model and data → attach → judge → fit → judge → files; and what is done with the files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rankloom import formats
from rankloom.core.attach import attach
from rankloom.errors import FileError, MissingExtra, StateError
from rankloom.files.folders import drop, replace_file, writing
from rankloom.files.lock import check_free, locked
from rankloom.files.strict import as_json
from rankloom.formats.saving import Parcel, parcel
from rankloom.hf.folder import LAST as MODEL
from rankloom.hf.folder import model_folder
from rankloom.hf.models import Loaded, device_of, known_head, load_model, task_of, with_heads
from rankloom.hf.packed import GLOB as PACKED
from rankloom.hf.packed import save_packed
from rankloom.jobs.evaluation import Answer, Evaluator
from rankloom.jobs.notes import plan_notes
from rankloom.jobs.rundata import RunRecords, judged_records, prepared, read_records
from rankloom.store.base import Store
from rankloom.train.checkpoint import PLACE
from rankloom.train.chunked_loss import loss_of_batches
from rankloom.train.config import DataSettings, RunConfig, as_data
from rankloom.train.configfile import dump
from rankloom.train.curve import PICTURE, picture
from rankloom.train.data import Batches, Masking, Prepared, masking, preview
from rankloom.train.engine import join
from rankloom.train.fit import Result, fit
from rankloom.train.lines import LOG
from rankloom.train.processes import Processes
from rankloom.train.report import METRICS, Report, Row, read_metrics
from rankloom.train.rng import seed_all
from rankloom.train.settings import TrainSettings

CONFIG, RECORD, ADAPTER, BASE = "config.yaml", "run.json", "adapter", "base"
HELD = (ADAPTER, PLACE, RECORD, CONFIG, METRICS)
"""What a run leaves in its folder, whole or broken off."""
CALIBRATION = 64
"""Rows of training data that a start looks at."""
PACKAGES = ("rankloom", "torch", "transformers", "accelerate", "safetensors", "peft")
Tell = Callable[[str, str], None]
"""Told (what, text) of each stage as it comes."""


@dataclass(frozen=True)
class JobReport:
    """What a job came to, in figures."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        found: dict[str, Any] = plain(self)
        return found


@dataclass(frozen=True)
class JobResult(JobReport):
    """What a training came to. `before`, `after`: metrics on held-out data; `compatibility`: who else can load the
    adapter; `answers`: (before, after) to the same question; `curve`: the picture of the losses, if drawn.
    """

    out: Path
    adapter: Path
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    seconds: float
    tokens: int
    trainable: int
    total: int
    final_loss: float
    stopped: str
    compatibility: str = ""
    answers: tuple[tuple[Answer, Answer], ...] = ()
    notes: tuple[str, ...] = field(default=())
    curve: Path | None = None


@dataclass(frozen=True)
class Trained:
    """A finished training: what it came to, and the model with its adapter speaking."""

    result: JobResult
    loaded: Loaded


def train_job(
    config: RunConfig,
    *,
    resume: bool | str = False,
    tell: Tell | None = None,
    report: Callable[[Row], None] | Report | None = None,
) -> Trained:
    """Fine-tune by `config`, judged before and after, into `config.out`.

    That folder then holds `config.yaml` (the resolved run, to be repeated), `metrics.jsonl`, `train.log`, `loss.png`
    (extra `plot`), `checkpoints/`, `adapter/` and `run.json`.

    Started in several processes (torchrun), each does its share, and the main one tells, reports and writes.

    Raises:
        SettingsError, TargetError, FileError, DataError, StateError: before training, nothing half-written.
        PeerError: another process failed.
    """
    processes = join(device_of(config.need_model().device).type)
    say = tell if tell is not None and processes.main else _silent
    out = Path(config.need_out()).expanduser()
    ready = processes.agree(lambda: _ready(config, out, resume, processes, say))
    config, loaded = ready.config, ready.loaded
    with ExitStack() as stack:
        processes.agree(lambda: stack.enter_context(locked(out)) if processes.main else None)
        if processes.main and not resume:
            stack.enter_context(_taken_back(out))
        processes.agree(lambda: _begin(ready, out, resume) if processes.main else None)
        batches, chosen = ready.batches, config.train
        say("training", f"{chosen.steps} steps; before and after, the model is judged on {ready.evaluator.scope}")
        result = fit(
            loaded.model, batches, settings=chosen, evaluate=ready.evaluator, out=out, resume=resume, report=report
        )
        found = _result(ready, result, out)
        together = processes.agree if chosen.sharding == "none" else processes.meet
        made = together(lambda: parcel(loaded.model, config.name))
        written = processes.agree(lambda: _saved(ready, found, made) if processes.main else found)
    return Trained(processes.from_main(written), loaded)


def _begin(ready: _Ready, out: Path, resume: bool | str) -> None:
    """Write what a run needs before its first step, to be gone on with."""
    check_out(out, resume)  # another run may have come and gone while the model was loaded
    with writing(out):
        _keep_base(ready, out)
        replace_file(out / CONFIG, dump(ready.config).encode())


@contextmanager
def _taken_back(out: Path) -> Iterator[None]:
    """Where a run that begins here is refused before its first step, nothing stays that a second try would meet."""
    try:
        yield
    except Exception:
        trained = any(row.get("event") == "train" for row in read_metrics(out))
        if not trained and not (out / PLACE).exists():
            for name in (CONFIG, METRICS, LOG, BASE):
                drop(out / name)
        raise


@dataclass(frozen=True)
class _Ready:
    """A job that has all it needs: the resolved configuration, the adapted model, and both kinds of data."""

    config: RunConfig
    loaded: Loaded
    records: RunRecords
    batches: Batches
    evaluator: Evaluator


def _ready(config: RunConfig, out: Path, resume: bool | str, processes: Processes, say: Tell) -> _Ready:
    data, settings = config.need_data(), config.need_model()
    check_out(out, resume)
    if processes.main:
        check_free(out)
    records = read_records(data, config.seed, known_head(settings))
    seed_all(config.seed)
    base = out / BASE if resume and (out / BASE).is_dir() else None
    used = settings if base is None else dataclasses.replace(settings, path=str(base))
    loaded = load_model(used, records.form, records.labels)
    train = prepared(records.train, loaded.tokenizer, data, loaded.task)
    held = prepared(records.evaluation, loaded.tokenizer, data, loaded.task)
    say("data", f"{train.summary()}\nevaluation: {records.note}")
    say("preview", preview(train[0], loaded.tokenizer, labels=train.labels))
    batches = Batches(
        train,
        data.batch_size,
        config.seed,
        packing=data.packing,
        rank=processes.rank,
        world=processes.world,
        masking=_masking(loaded),
    )
    _adapt(loaded, config, batches, made=base is not None)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(settings, task=loaded.task),
        data=dataclasses.replace(
            data, hold_out=records.held_out, labels=records.labels or data.labels, max_length=train.max_length
        ),
        train=_length(config.train, data, len(batches)),
    )
    return _Ready(config, loaded, records, batches, _evaluator(loaded, held, config, processes))


def _saved(ready: _Ready, found: JobResult, made: Parcel) -> JobResult:
    """The adapter and the record of the job, written; the result as it then is."""
    config, out = ready.config, found.out
    with writing(out):
        card = _card(config, ready.records, found)
        saved = made.write(out / ADAPTER, card)
        found = _pictured(dataclasses.replace(found, compatibility=str(saved.compat)))
        replace_file(out / RECORD, as_json({"config": as_data(config), "versions": versions(), **found.as_dict()}))
    return found


def _pictured(found: JobResult) -> JobResult:
    """With the curve of its losses drawn, or a note on what is missing for it."""
    try:
        made = picture(read_metrics(found.out), found.out.name)
    except MissingExtra as error:
        return dataclasses.replace(found, notes=(*found.notes, str(error)))
    replace_file(found.out / PICTURE, made)
    return dataclasses.replace(found, curve=found.out / PICTURE)


def _adapt(loaded: Loaded, config: RunConfig, batches: Batches, *, made: bool) -> None:
    """Attach the plan; `made`: to the base that its start made before."""
    plan = with_heads(config.plan, loaded.heads)
    bank = attach(
        loaded.model,
        dataclasses.replace(plan, start=None) if made else plan,
        config.name,
        probe=_probe(batches, loaded),
        calibration=_calibration(batches, config.need_data().batch_size),
    )
    bank.plans[config.name] = plan


def _keep_base(ready: _Ready, out: Path) -> None:
    """Keep a base that the plan made from values or data beside the run: only the adapter's own base is its base."""
    plan, loaded = ready.config.plan, ready.loaded
    if plan.start is None and isinstance(plan.store, Store | None):
        return
    if not (out / BASE).is_dir():
        with model_folder(out / BASE) as hidden:
            save_packed(loaded.model, loaded.tokenizer, hidden)
    loaded.model.name_or_path = str(out / BASE)


def calibration(config: RunConfig, tokenizer: Any) -> list[dict[str, Any]] | None:
    """Batches of the training data for a start that looks at data; None where there is no data."""
    if config.data is None:
        return None
    settings = config.need_model()
    records = read_records(config.data, config.seed, known_head(settings))
    train = prepared(records.train, tokenizer, config.data, task_of(settings, records.form))
    return _calibration(Batches(train, config.data.batch_size, config.seed), config.data.batch_size)


def _calibration(batches: Batches, rows: int) -> list[dict[str, Any]]:
    return [batches.batch_at(i) for i in range(min(len(batches), math.ceil(CALIBRATION / rows)))]


def eval_job(config: RunConfig, adapter: Path | None = None, tell: Tell | None = None) -> dict[str, dict[str, float]]:
    """Metrics of the base, and with `adapter` of the adapted model, on `config.data`: what a training judges by, or the
    whole source where nothing is held out. `{"base": {…}, "adapter": {…}}`; `tell` is told what is judged.
    """
    config, data = on_its_base(config, adapter), config.need_data()
    records, note = judged_records(data, config.seed, known_head(config.need_model()))
    (tell or _silent)("evaluation", note)
    seed_all(config.seed)
    loaded = load_model(config.need_model(), records.format, records.labels)
    evaluator = _evaluator(loaded, prepared(records, loaded.tokenizer, data, loaded.task), config, Processes())
    if adapter is None:
        return {"base": evaluator(loaded.model)}
    bank = formats.load(loaded.model, adapter, config.name)
    with bank.using():
        base = evaluator(loaded.model)
    with bank.using(config.name):
        return {"base": base, "adapter": evaluator(loaded.model)}


def load_adapted(config: RunConfig, adapter: Path | None) -> Loaded:
    """The model of `config` with the adapter of a folder, speaking."""
    config = on_its_base(config, adapter)
    loaded = load_model(config.need_model(), labels=known_labels(config))
    if adapter is not None:
        formats.load(loaded.model, adapter, config.name).use(config.name)
    return loaded


def on_its_base(config: RunConfig, adapter: Path | None) -> RunConfig:
    """The run on the base that lies with its adapter, where the run, or `quantize`, packed one of its own for it."""
    if adapter is None:
        return config
    beside = adapter.absolute().parent
    found = next((folder for folder in (beside / BASE, beside) if any(folder.glob(PACKED))), None)
    return (
        config
        if found is None
        else dataclasses.replace(config, model=dataclasses.replace(config.need_model(), path=str(found), revision=None))
    )


def known_labels(config: RunConfig) -> tuple[str, ...]:
    """The class names that the configuration of a classification states."""
    return config.data.labels or () if config.data is not None else ()


def check_out(out: Path, resume: bool | str) -> None:
    """Refuse a folder that cannot be written, or that holds a run which is not to be resumed."""
    _check_place(out, "out=")
    held = [n for n in HELD if (out / n).exists()]
    if held and not resume:
        raise StateError(
            f"{out} already holds a run ({', '.join(held)}): --resume auto goes on with it, or give another out="
        )


def check_empty(out: Path, what: str = "a model") -> None:
    """Refuse a folder that holds anything, or that cannot be written; `what` is to be written there."""
    _check_place(out, "--out")
    held = sorted(x.name for x in out.iterdir()) if out.is_dir() else []
    if held:
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise StateError(
            f"{out} is not empty ({', '.join(held[:3])}{more}): {what} gets a folder of its own; give another --out"
        )


def _check_place(out: Path, option: str) -> None:
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise FileError(f"{out}: cannot be written: {there} is a file; give another {option}")
    if model := next((n for n in (MODEL, "model.safetensors", "pytorch_model.bin") if (out / n).exists()), None):
        raise StateError(f"{out} is a model's folder ({model}): give another {option}")


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _evaluator(loaded: Loaded, held: Prepared, config: RunConfig, processes: Processes) -> Evaluator:
    data = config.need_data()
    if held.labels and loaded.model.config.pad_token_id is None:
        loaded.model.config.pad_token_id = held.pad_id
    return Evaluator(
        held,
        loaded.tokenizer,
        batch_size=data.batch_size,
        most_answers=data.eval_answers,
        answer_tokens=data.answer_tokens,
        template=data.template,
        loss=loss_of_batches(config.train),
        masking=_masking(loaded),
        processes=processes,
    )


def _length(settings: TrainSettings, data: DataSettings, batches: int) -> TrainSettings:
    """The settings with as many steps as the epochs make, where epochs are given."""
    if data.epochs is None:
        return settings
    return dataclasses.replace(settings, steps=max(1, math.ceil(data.epochs * batches / settings.accumulate)))


def _masking(loaded: Loaded) -> Masking | None:
    return masking(loaded.tokenizer) if loaded.task == "masked-lm" else None


def _probe(batches: Batches, loaded: Loaded) -> dict[str, Any]:
    """One row of the first batch, to hear every site."""
    first = {k: v[:1].to(loaded.model.device) for k, v in batches.batch_at(0).items()}
    del first["labels"]
    return first


def _result(ready: _Ready, result: Result, out: Path) -> JobResult:
    loaded, evaluator = ready.loaded, ready.evaluator
    notes = (*loaded.notes, *ready.batches.prepared.notes, *plan_notes(ready.config.plan, loaded.model))
    history = evaluator.history
    return JobResult(
        out=out,
        adapter=out / ADAPTER,
        before=result.metrics.get("before", {}),
        after=result.metrics.get("after", {}),
        steps=result.steps,
        seconds=round(result.seconds, 3),
        tokens=result.tokens,
        trainable=result.trainable,
        total=sum(p.numel() for p in loaded.model.parameters()),
        final_loss=result.losses[-1],
        stopped=result.stopped,
        answers=tuple(zip(history[0], history[-1])) if len(history) > 1 else (),
        notes=notes,
    )


def _card(config: RunConfig, records: RunRecords, found: JobResult) -> dict[str, Any]:
    """What the model card tells beyond the adapter itself."""
    train = {k: v for k, v in plain(config.train).items() if v is not None}
    return {
        "data": {"training": f"{len(records.train)} records of {records.train.source}", "evaluation": records.note},
        "metrics": {k: {"before": found.before.get(k, ""), "after": v} for k, v in found.after.items()},
        "settings": {**train, "batch_size": config.need_data().batch_size},
    }


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON takes them; a number that is none becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _silent(what: str, text: str) -> None:
    return None
