"""`fit`: train the adapters of a model, or a whole model, in one call."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankloom.core.notes import Notes
from rankloom.core.rule import Rule
from rankloom.errors import SettingsError, StateError
from rankloom.files.disk import rename
from rankloom.files.folders import sweep, writing
from rankloom.files.lock import locked
from rankloom.train.causal import checked_batches
from rankloom.train.checkpoint import FORM, PLACE, Checkpoint, find_checkpoint, model_tensors, steps_in
from rankloom.train.chunked_loss import loss_of_batches
from rankloom.train.columns import Columns
from rankloom.train.engine import accelerator, processes_of
from rankloom.train.evaluate import Evaluate
from rankloom.train.identity import identity
from rankloom.train.lines import lines_for_people, log_file
from rankloom.train.loop import Loop
from rankloom.train.loss import Loss, Terms, one
from rankloom.train.modes import bank_or_none, mode
from rankloom.train.named import only_stream, streams_of
from rankloom.train.optim import build_groups, build_optimizer, factor, set_rates
from rankloom.train.processes import Processes
from rankloom.train.report import MetricsFile, Progress, Report, Reports, Row, Told, on_terminal, tracker
from rankloom.train.rng import seed_all
from rankloom.train.ruleset import RuleSet
from rankloom.train.run import TrainRun, checkpointed, only_these_train, selection_for_all_threads
from rankloom.train.settings import TrainSettings
from rankloom.train.sharding import shard
from rankloom.train.signals import listening
from rankloom.train.stream import Source, dealt

STEPS, LR = 200, 1e-3


@dataclass(frozen=True)
class Best:
    """The lowest eval loss: where, what, and its checkpoint if there is one."""

    step: int
    loss: float
    folder: Path | None


@dataclass(frozen=True)
class Result:
    """What a run came to.

    `losses`: of every step (without penalties), those before a resume included; `metrics`: `before` and `after`, where
    `evaluate` was given; `stopped`: `"steps"` or `"patience"`; `folder`: the run's own; `checkpoint`: its newest.
    """

    losses: list[float]
    steps: int
    seconds: float
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    best: Best | None = None
    folder: Path | None = None
    checkpoint: Path | None = None
    stopped: str = "steps"
    skipped: int = 0
    tokens: int = 0
    trainable: int = 0


def fit(
    model: nn.Module,
    batches: Source | Mapping[str, Source],
    steps: int = STEPS,
    lr: float = LR,
    rules: Iterable[Rule] = (),
    *,
    loss: Loss | None = None,
    evaluate: Evaluate | None = None,
    context: tuple[str, ...] = (),
    settings: TrainSettings | None = None,
    out: str | Path | None = None,
    resume: bool | str | Path = False,
    report: Callable[[Row], None] | Report | None = None,
) -> Result:
    """Train `model` in place, on the device where it is.

    The settings' seed makes what is drawn here repeat. A method draws its factors before, in `attach`: with
    `torch.manual_seed(…)` ahead of that, the whole run repeats.

    With adapters, the tensors of the active ones train and the base stays bitwise as it is; without, every parameter
    that requires a gradient trains.

    Args:
        model: any module.
        batches: a list or DataLoader of batches (iterated again and again), a function from batch number to batch, or
            `rankloom.train.data.Batches`. Or {name: such a source}: each step draws one batch from each stream, and
            `loss` gets {name: batch}.
        steps, lr: of the optimizer; say them here or in `settings`.
        rules: what is added to gradient descent, beside the rules of the adapters' methods and plans.
        loss: `loss(model, batch)` → 0-d tensor, as those of `rankloom.objectives`; default: `model(**batch).loss` for
            mappings, cross entropy or squared error for tuples (inputs …, target).
        evaluate: batches for a mean loss, or `evaluate(model)` → number or dict of numbers; run before and after, and
            every `settings.eval_every` steps.
        context: columns of each batch that gates are told (a mapping's keys, such as "attention_mask" or "task"); the
            model itself gets them only where its forward names them. Here or in `settings`.
        out: folder for metrics.jsonl, train.log and checkpoints; one run at a time.
        resume: `True` or `"auto"`: go on from the newest good checkpoint in `out`, if there is one (else a warning says
            that there is none); or a folder.
        report: is told every row of metrics.jsonl, in the place of the bar, or of the lines where no terminal is.

    Raises:
        SettingsError, StateError: before anything is trained; also where `Batches` and the model do not fit: texts for
            a model that sees the token it is to predict, packed examples that it does not keep apart.
        UnreachedError: a trainable tensor has no gradient in the first step.
        DivergedError: a loss, gradient or weight is not finite.
        FileError: the checkpoint asked for cannot be read, or the disk refuses a new one; the ones before stay.
        Terminated, Interrupted: SIGTERM, SIGHUP, SIGUSR1 or SIGINT came, in the main thread and with `out`; the step
            was finished and its checkpoint is complete. SIGTERM or SIGINT again is as if there were no run.
    """
    settings = _settings(settings, steps, lr, tuple(context))
    out = None if out is None else Path(out)
    _check(settings, loss, evaluate, out)
    batches = only_stream(batches, loss is not None)
    with ExitStack() as stack:
        enter = stack.enter_context
        asked = enter(listening(out is not None))
        enter(selection_for_all_threads(model))
        parameters = enter(only_these_train(model))
        device = _device(parameters)
        engine = enter(accelerator(device, settings))
        processes = processes_of(engine)
        if out is not None:
            processes.agree(lambda: enter(locked(out)) if processes.main else None)
        checkpoint = processes.agree(lambda: _checkpoint(resume, out))
        if out is not None:
            processes.agree(lambda: _clear_the_way(out, checkpoint, resume) if processes.main else None)
        wanted = out is not None or checkpoint is not None or processes.world > 1
        about = identity(model, _of_all(settings, batches, processes)) if wanted else {}
        processes.check_same({**about, "the checkpoint to resume from": checkpoint and checkpoint.step})
        processes.spread(model_tensors(model).values())
        shard(model, settings, processes)
        enter(checked_batches(model, (batches, evaluate), loss is not None))
        enter(checkpointed(model, settings.gradient_checkpointing))
        enter(mode(model, True))
        bank = bank_or_none(model)
        if bank is not None and settings.end_with == "best":
            bank.keep_originals()
        driver = RuleSet(bank, rules)
        run = TrainRun(model, settings.steps, parameters, device=device, notes=Notes(driver.reads))
        seed_all(_seed(settings, processes))
        run.optimizer = build_optimizer(build_groups(run, driver, settings), settings)
        loop = Loop(
            run=run,
            rules=driver,
            stream=streams_of(batches, processes, kept=out is not None),
            told=_told(run, settings, stack),
            loss=loss or loss_of_batches(settings),
            weigh=Terms(model) if loss is None else one,
            evaluate=evaluate,
            settings=settings,
            engine=engine,
            processes=processes,
            report=Reports([]),
            asked=asked,
            out=out,
            identity=about,
        )
        set_rates(run.optimizer, factor(0, settings))
        driver.start(run)
        run.adopt()
        if checkpoint is not None:
            loop.resume(checkpoint)
        loop.report = processes.agree(lambda: _reports(loop, report, checkpoint))
        stack.callback(loop.report.close)
        return _finish(loop, loop.train())


def _settings(settings: TrainSettings | None, steps: int, lr: float, context: tuple[str, ...]) -> TrainSettings:
    if settings is None:
        return TrainSettings(steps=steps, lr=lr, context=context)
    settings = dataclasses.replace(settings, context=settings.context or context)
    for name, given, default in (("steps", steps, STEPS), ("lr", lr, LR), ("context", context, ())):
        said = getattr(settings, name)
        if given not in (default, said):
            raise SettingsError(f"{name}={given} and settings.{name}={said}: say it once")
    return settings


def _told(run: TrainRun, settings: TrainSettings, stack: ExitStack) -> Columns | None:
    """What hands columns of the batches to gates, until the run ends."""
    if not settings.context:
        return None
    told = Columns(run.model, run.bank.selector, settings.context, lambda: run.in_pass, lambda: run.batch)
    stack.callback(told.close)
    return told


def _check(settings: TrainSettings, loss: Loss | None, evaluate: Evaluate | None, out: Path | None) -> None:
    wants = [n for n in ("eval_every", "patience") if getattr(settings, n) is not None]
    wants += ["end_with='best'"] if settings.end_with == "best" else []
    if wants and evaluate is None:
        raise SettingsError(f"{wants[0]} needs something to evaluate: give evaluate=batches, or evaluate=function")
    if settings.patience is not None and settings.eval_every is None:
        raise SettingsError("patience counts evaluations: give eval_every=…")
    if settings.chunked_loss is not None and loss is not None:
        raise SettingsError(f"chunked_loss={settings.chunked_loss} is a loss, and loss=… is another: give one of them")
    for name in ("end_with", "save_every"):
        if getattr(settings, name) not in ("last", None) and out is None:
            raise SettingsError(f"{name}={getattr(settings, name)!r} needs checkpoints: give out=folder")


def _seed(settings: TrainSettings, processes: Processes) -> int | None:
    """The seed of all processes: they draw the same, whether one is set or not."""
    if settings.seed is not None or processes.world == 1:
        return settings.seed
    return processes.from_main(int(torch.randint(2**31, ())))


def _of_all(settings: TrainSettings, batches: Source | Mapping[str, Source], processes: Processes) -> TrainSettings:
    """The settings that one process would need to do the same: batches that are dealt out in turns are all its own."""
    each = list(batches.values()) if isinstance(batches, Mapping) else [batches]
    turns = 1 if all(dealt(source, processes) for source in each) else processes.world
    return dataclasses.replace(settings, accumulate=settings.accumulate * turns)


def _checkpoint(resume: bool | str | Path, out: Path | None) -> Checkpoint | None:
    """What to resume from. Refuses an `out` whose checkpoints this run would write among."""
    found = find_checkpoint(resume, out)
    newer = [] if out is None else _newer(out / PLACE, found)
    if newer and resume not in (True, "auto"):
        raise StateError(
            f"{out} already holds checkpoints, the newest of step {newer[-1]}: resume='auto' to go on from there, "
            "or give another out="
        )
    return found


def _newer(root: Path, found: Checkpoint | None) -> list[int]:
    """Steps of the checkpoints below `root` that are not behind the one found."""
    here = found is not None and found.folder.parent == root
    return [step for step in steps_in(root) if found is None or not here or step > found.step]


def _clear_the_way(out: Path, found: Checkpoint | None, resume: bool | str | Path) -> None:
    """Set broken checkpoints aside, so that the newest in `out` is always this run's; remove what a kill left."""
    if found is None and resume is not False:
        warnings.warn(f"nothing to resume in {out}, starting at step 0", stacklevel=5)
    root = out / PLACE
    sweep(root)
    for step in _newer(root, found):
        aside = root / f"broken-{FORM.format(step)}-{time.time_ns()}"
        with writing(out):
            rename(root / FORM.format(step), aside)
        warnings.warn(f"the broken checkpoint of step {step} is now {aside.name}", stacklevel=3)


def _device(parameters: dict[str, nn.Parameter]) -> torch.device:
    device = next(iter(parameters.values())).device
    if device.type == "meta":
        raise StateError("the model is on the meta device, without values: load its weights before training")
    if device.type == "cpu" and torch.cuda.is_available():
        warnings.warn("the model is on the CPU and a GPU is free: model.to('cuda') trains there", stacklevel=3)
    return device


def _reports(loop: Loop, report: Callable[[Row], None] | Report | None, checkpoint: Checkpoint | None) -> Report:
    each: list[Report] = []
    if not loop.processes.main:
        return Reports(each)
    if report is not None:
        each.append(report if isinstance(report, Report) else Told(report))
    reports = Reports(each)
    total, done = loop.settings.steps, loop.run.step
    config = {k: v for k, v in dataclasses.asdict(loop.settings).items() if k != "report_to"}
    try:
        each += [tracker(name, loop.out, config) for name in loop.settings.trackers]
        if loop.out is not None:
            mine = checkpoint is not None and checkpoint.folder.parent == loop.out / PLACE
            each.append(MetricsFile(loop.out, checkpoint.step if checkpoint is not None and mine else None))
            each.append(log_file(loop.out, total, done, resumed=mine))
        if report is None:
            each.append(Progress(total, done) if on_terminal() else lines_for_people(total, done))
        reports.row(_first_row(loop, config, checkpoint))
    except BaseException:
        reports.close()
        raise
    return reports


def _first_row(loop: Loop, config: dict[str, Any], checkpoint: Checkpoint | None) -> dict[str, Any]:
    from rankloom import __version__

    if checkpoint is not None:
        return {"event": "resume", "step": checkpoint.step, "from": checkpoint.folder.name}
    return {
        "event": "start",
        "step": 0,
        "settings": config,
        "checkpoints": {"steps": loop.settings.save_steps, "seconds": loop.settings.save_seconds} if loop.out else None,
        "adapters": loop.identity.get("adapters", {}),
        "rules": [type(rule).__name__ for rule in loop.rules.each],
        "trainable": _count(loop.run.parameters),
        "total": sum(p.numel() for p in loop.run.model.parameters()),
        "device": str(loop.run.device),
        "versions": {"rankloom": __version__, "torch": torch.__version__},
    }


def _finish(loop: Loop, after: dict[str, float] | None) -> Result:
    standing, out = loop.standing, loop.out
    metrics = {"before": standing.before, "after": after}
    best = None
    if standing.best is not None:
        step = int(standing.best["step"])
        kept = out is not None and step in steps_in(out / PLACE)
        best = Best(step, standing.best["loss"], out / PLACE / FORM.format(step) if out is not None and kept else None)
    result = Result(
        losses=standing.losses,
        steps=loop.run.step,
        seconds=standing.seconds,
        metrics={name: found for name, found in metrics.items() if found is not None},
        best=best,
        folder=out,
        checkpoint=None if out is None else out / PLACE / FORM.format(loop.run.step),
        stopped="patience" if loop.run.step < loop.settings.steps else "steps",
        skipped=standing.skipped,
        tokens=standing.tokens,
        trainable=_count(loop.run.parameters),
    )
    loop.report.row(
        {
            "event": "end",
            "step": result.steps,
            "stopped": result.stopped,
            "metrics": result.metrics,
            "best": standing.best,
            "seconds": round(result.seconds, 3),
            "tokens": result.tokens,
            "skipped": result.skipped,
        }
    )
    return result


def _count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(p.numel() for p in dict.fromkeys(parameters.values()))
