"""The one training loop: the fixed order of a step, and what happens between steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from rankloom.core.fuse import known_groups, recall_groups
from rankloom.errors import StateError
from rankloom.files.folders import writing
from rankloom.optim.state import optimizer_state, restore_optimizer
from rankloom.train import guard
from rankloom.train.checkpoint import (
    FORM,
    PLACE,
    Checkpoint,
    as_adapter,
    folds,
    load_checkpoint,
    model_tensors,
    prune,
    restore_base,
    restore_weights,
    save_checkpoint,
)
from rankloom.train.columns import Columns
from rankloom.train.engine import restore_scaler, scaler_state
from rankloom.train.evaluate import Evaluate, evaluate_run, loss_of
from rankloom.train.identity import check_identity
from rankloom.train.loss import Loss, Weigh, labelled, move, shares, tokens
from rankloom.train.modes import bank_or_none
from rankloom.train.optim import factor, set_rates
from rankloom.train.processes import Processes
from rankloom.train.report import Report, memory_mb
from rankloom.train.rng import rng_state, set_rng_state
from rankloom.train.ruleset import RuleSet
from rankloom.train.run import TrainRun
from rankloom.train.settings import TrainSettings
from rankloom.train.signals import Leave, StopRequest
from rankloom.train.stream import Stream

T = TypeVar("T")
MOST_SKIPS = 50
"""Overflowing fp16 steps in a row after which a run gives up: the scale has then fallen by 2⁵⁰."""


@dataclass
class Standing:
    """What a run has come to; saved with each checkpoint.

    `judged`: step of the last evaluation that was due; `waited`: evaluations since the lowest loss.
    """

    losses: list[float] = field(default_factory=list)
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    before: dict[str, float] | None = None
    best: dict[str, float] | None = None
    judged: int = 0
    waited: int = 0


@dataclass
class Loop:
    """A run with everything that it needs; `train` goes from where it stands to the end.

    `told`: hands columns of batches to gates; `weigh`: what a batch counts; `processes`: those that share the run.
    """

    run: TrainRun
    rules: RuleSet
    stream: Stream
    told: Columns | None
    loss: Loss
    weigh: Weigh
    evaluate: Evaluate | None
    settings: TrainSettings
    engine: Any
    processes: Processes
    report: Report
    asked: StopRequest
    out: Path | None
    identity: Mapping[str, Any]
    standing: Standing = field(default_factory=Standing)
    _skips: int = 0
    _saved_at: int = -1
    _saved_when: float = field(default_factory=lambda: time.monotonic())
    _latest: tuple[int, dict[str, float]] = (-1, {})
    _here: tuple[float, int] = (0.0, 0)

    def __post_init__(self) -> None:
        self._reached = guard.Reached(self.settings.dead_gradients)

    def train(self) -> dict[str, float] | None:
        """Evaluate, train to the end or until patience runs out, evaluate; the last metrics, if any.

        A signal ends it by an exception, after a checkpoint of the step that was done.
        """
        try:
            self._train()
            return self._closed()
        except Leave:
            self._stop()

    def _closed(self) -> dict[str, float] | None:
        """The last checkpoint, the weights that the run is to end with, and their metrics."""
        if self._saved_at != self.run.step:
            self._save()
        with self._changing():
            restored = self._take_best()
            self.rules.finish(self.run)
        guard.check_finite(self.run.parameters, self.run.step)
        if self.evaluate is not None and (restored or self.rules.uses("finish")):
            return self._metrics()
        return self._latest[1] or None

    def _train(self) -> None:
        if self.evaluate is not None and self.standing.before is None:
            self.standing.before = self._metrics()
        self._between()
        while self.run.step < self.settings.steps and not self.out_of_patience:
            self._step()
            if self.asked.agree(self.processes):
                self._stop()
            self._between()
        if self.evaluate is not None and self._latest[0] != self.run.step:
            self._latest = (self.run.step, self._metrics())

    def _stop(self) -> NoReturn:
        """Save, and raise what the signal asks for."""
        if self._saved_at != self.run.step:
            self._save()
        ending = self.asked.ending(f"stopped after step {self.run.step}; resume='auto' goes on from its checkpoint")
        self.report.row({"event": "signal", "step": self.run.step, "signal": self.asked.number})
        raise ending

    @property
    def out_of_patience(self) -> bool:
        """True when the loss has not fallen for too many evaluations."""
        return self.settings.patience is not None and self.standing.waited >= self.settings.patience

    def resume(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint stood; after the rules' `start`. Raises `StateError` where it does not fit."""
        state = checkpoint.state(self.run.device)
        check_identity(state["identity"], self.identity)
        self.rules.check(state["rules"])
        self.processes.agree(lambda: self.stream.restore(state["stream"]))
        self._take(checkpoint, state["journal"])
        restore_scaler(self.engine, state["scaler"])
        self.rules.restore(state["rules"])
        self.run.adopt()
        restore_optimizer(self.run.optimizer, self.run.parameters, state["optimizer"])
        self.run.step = checkpoint.step
        self.standing = Standing(**state["standing"])
        if self.out is not None and checkpoint.folder.parent == self.out / PLACE:
            self._saved_at = checkpoint.step
        set_rng_state(state["rng"])
        recall_groups(self.run.model, state["groups"])

    def _step(self) -> None:
        run, rules, settings, scaler = self.run, self.rules, self.settings, self.engine.scaler
        began = time.perf_counter()
        with self._changing():
            rules.before_step(run)
            run.adopt()
            set_rates(run.optimizer, factor(run.step, settings) * rules.rate(run))
        batches = self.processes.agree(lambda: [self.stream.next() for _ in range(settings.accumulate)])
        data, total = self._backward(batches)
        if not self._reached.settled:
            self._reached.look(run.parameters, last=run.step + 1 >= run.total_steps)
        if scaler is not None:
            scaler.unscale_(run.optimizer)
        norm = float(guard.total_norm(run.parameters))
        if not math.isfinite(total) or (scaler is None and not math.isfinite(norm)):
            raise guard.diverged(
                run.step + 1, "loss" if not math.isfinite(total) else "gradient", run.parameters, total
            )
        if not math.isfinite(norm):
            self._skip()
            return
        with self._changing():
            norm = self._change(norm, total)
        lr = float(run.optimizer.param_groups[0]["lr"])
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        self._skips = 0
        self._tell(batches, began, {"loss": data, "lr": lr, "grad_norm": norm, "penalty": total - data})

    def _change(self, norm: float, total: float) -> float:
        """From finished gradients to stepped weights; the gradients' norm."""
        run, rules = self.run, self.rules
        rules.after_backward(run)
        if rules.uses("after_backward"):
            norm = float(guard.total_norm(run.parameters))
            if not math.isfinite(norm):
                raise guard.diverged(run.step + 1, "gradient that the rules made", run.parameters, total)
        if self.settings.clip is not None:
            guard.scale_gradients(run.parameters, norm, self.settings.clip)
        self._optimize()
        rules.after_step(run)
        run.adopt()
        return norm

    def _changing(self) -> AbstractContextManager[Any]:
        """Inside, no other thread copies tensors of adapters to save them."""
        bank = bank_or_none(self.run.model)
        return nullcontext() if bank is None else bank.lock

    def _backward(self, batches: list[Any]) -> tuple[float, float]:
        """Gradients of the mean loss over the batches of all processes; the loss without and with penalties."""
        parts = shares(batches, self.weigh, self.processes)
        with self.processes.own_random():
            data, total = self._together(lambda: self._backward_here(batches, parts))
        self.processes.add_gradients(self.run.parameters.values())
        data, total = self.processes.sum(data, total)
        return data, total

    def _backward_here(self, batches: list[Any], parts: list[float]) -> tuple[float, float]:
        """Batches with nothing to predict are passed over; a sharded base needs its turn all the same."""
        data, total = 0.0, 0.0
        for batch, share in zip(batches, parts):
            if not share and self.settings.sharding == "none":
                continue
            batch = move(batch if share else labelled(batch), self.run.device)
            with self.run.watched(batch, self.rules.uses("loss")):
                with self.engine.autocast():
                    plain = self.loss(self.run.model, batch)
                guard.check_graph(plain, self.run.step + 1)
                full = self.rules.loss(self.run, plain)
            self.engine.backward((full if share == 1 else full * share).reshape(()))
            if self.told is not None:
                self.told.settle()
            data += share * float(plain.detach())
            total += share * float(full.detach())
        return data, total

    def _together(self, work: Callable[[], T]) -> T:
        """`work` with the model, of all processes; over a sharded base the model itself meets the others."""
        return self.processes.agree(work) if self.settings.sharding == "none" else self.processes.meet(work)

    def _optimize(self) -> None:
        if self.engine.scaler is None:
            self.run.optimizer.step()
            return
        self.engine.scaler.step(self.run.optimizer)
        self.engine.scaler.update()

    def _skip(self) -> None:
        """The gradients overflowed in fp16: lower the scale, leave weights, rules and schedule alone, go on."""
        self._optimize()
        self.run.optimizer.zero_grad(set_to_none=True)
        self.standing.skipped += 1
        self._skips += 1
        self.report.row({"event": "skip", "step": self.run.step, "scale": float(self.engine.scaler.get_scale())})
        if self._skips >= MOST_SKIPS:
            raise guard.DivergedError(
                f"step {self.run.step + 1}: the gradients overflowed {self._skips} times in a row at ever smaller "
                "scales; use precision='bf16' or 'no'"
            )

    def _tell(self, batches: list[Any], began: float, values: dict[str, float]) -> None:
        standing, step = self.standing, self.run.step
        seconds, seen = time.perf_counter() - began, int(self.processes.sum(sum(map(tokens, batches)))[0])
        standing.losses.append(values["loss"])
        standing.tokens += seen
        standing.seconds += seconds
        self._here = (self._here[0] + seconds, self._here[1] + seen)
        row: dict[str, Any] = {"event": "train", "step": step, **values, "seconds": round(standing.seconds, 3)}
        if standing.tokens:
            row |= {"tokens": standing.tokens, "tokens_per_second": round(self._here[1] / self._here[0], 1)}
        if self.stream.epoch is not None:
            row["epoch"] = self.stream.epoch
        if not self.rules.uses("loss"):
            del row["penalty"]
        row["memory_mb"] = round(memory_mb(self.run.device), 1)
        self.report.step(row)
        if step % self.settings.log_every == 0 or step in (1, self.settings.steps):
            self.report.row(row)

    def _between(self) -> None:
        """Evaluate and save what is due at this step, the last one included; after a resume, what was still due."""
        step, settings, judged = self.run.step, self.settings, self.standing.judged
        due = self.evaluate is not None and (_due(settings.eval_every, step) or step == settings.steps)
        improved = due and judged != step and self._judge()
        if (improved or self._save_is_due()) and self._saved_at != step:
            self._save()

    def _save_is_due(self) -> bool:
        """After so many steps or, where nobody said how many, so long; the clock is the main process's."""
        if self.out is None or _due(self.settings.save_steps, self.run.step):
            return self.out is not None
        longest = self.settings.save_seconds
        if longest is None or self.run.step == 0:
            return False
        late = self.processes.main and time.monotonic() - self._saved_when >= longest
        return self.processes.sum(late)[0] > 0

    def _metrics(self) -> dict[str, float]:
        with self.asked.leaving() if self.processes.world == 1 else nullcontext():
            metrics = self.processes.from_main(self.processes.meet(self._evaluated))
        self.report.row({"event": "eval", "step": self.run.step, "metrics": metrics})
        return metrics

    def _evaluated(self) -> dict[str, float]:
        assert self.evaluate is not None
        return evaluate_run(self.evaluate, self.run, self.loss, self.weigh, self.engine, self.processes)

    def _judge(self) -> bool:
        """Evaluate and compare; True if this is the lowest loss so far. A checkpoint made before does not know it."""
        metrics = self._metrics()
        self._saved_at = -1
        self._latest = (self.run.step, metrics)
        self.standing.judged = self.run.step
        if "loss" not in metrics and self.settings.patience is None and self.settings.end_with == "last":
            return False
        loss, best = loss_of(metrics), self.standing.best
        if best is not None and not loss < best["loss"]:
            self.standing.waited += 1
            return False
        self.standing.best, self.standing.waited = {"step": self.run.step, "loss": loss}, 0
        return True

    def _save(self) -> None:
        if self.out is None:
            return
        weights, step = model_tensors(self.run.model), self.run.step
        guard.check_finite(weights, step)
        guard.check_finite(guard.optimizer_tensors(self.run.optimizer, self.run.parameters), step)
        self._saved_at, self._saved_when = step, time.monotonic()
        out, adapter = self.out, as_adapter(self.run.model)
        self.processes.agree(lambda: self._write(out, weights, adapter) if self.processes.main else None)

    def _write(self, out: Path, weights: Mapping[str, Tensor], adapter: Any) -> None:
        with writing(out):
            folder = save_checkpoint(out / PLACE, self.run.step, weights, self._state(), adapter)
        best = self.standing.best
        prune(out / PLACE, self.settings.keep, () if best is None else (int(best["step"]),))
        self.report.row({"event": "save", "step": self.run.step, "folder": str(folder.relative_to(out))})

    def _state(self) -> dict[str, Any]:
        return {
            "device": self.run.device.type,
            "identity": dict(self.identity),
            "journal": folds(self.run.model),
            "standing": dataclasses.asdict(self.standing),
            "optimizer": optimizer_state(self.run.optimizer, self.run.parameters),
            "scaler": scaler_state(self.engine),
            "rules": self.rules.state(),
            "stream": self.stream.state(),
            "rng": rng_state(),
            "groups": known_groups(self.run.model),
        }

    def _take_best(self) -> bool:
        best = self.standing.best
        if self.settings.end_with == "last" or best is None or best["step"] == self.run.step:
            return False
        assert self.out is not None
        folder = self.out / PLACE / FORM.format(int(best["step"]))
        if not folder.is_dir():
            raise StateError(
                f"end_with='best': the checkpoint of step {int(best['step'])} is not in {self.out / PLACE}"
            )
        checkpoint = load_checkpoint(folder)
        self._take(checkpoint, checkpoint.state(self.run.device)["journal"])
        return True

    def _take(self, checkpoint: Checkpoint, journal: Any) -> None:
        """The base as it was folded by then, and the checkpoint's weights; tensors that change their rank are followed
        in `parameters` and the optimizer.
        """
        bank = bank_or_none(self.run.model)
        before = {} if bank is None else {key: p for key, p, _ in bank.trainable()}
        restore_base(self.run.model, journal)
        restore_weights(self.run.model, checkpoint.weights, checkpoint.folder.name)
        for key, parameter, _ in () if bank is None else bank.trainable():
            if parameter is not before[key]:
                self.run.take_over(before[key], parameter)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step > 0 and step % every == 0
