"""What a run tells: metrics.jsonl, a bar on a terminal, trackers, and whoever wants the rows."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rankloom.errors import MissingExtra, SettingsError, one_line, suggest
from rankloom.files import disk
from rankloom.files.folders import replace_file, sweep, writing

Row = Mapping[str, Any]
"""One event: `event` (start, resume, train, eval, save, skip, end), `step`, and the event's own values."""
METRICS = "metrics.jsonl"


class Report(ABC):
    """Someone who is told every row."""

    @abstractmethod
    def row(self, row: Row) -> None:
        """Take one event."""

    def step(self, row: Row) -> None:
        """Take the values of one step; called at every step, rows or not."""
        return

    def close(self) -> None:
        """After the last row, also after an error."""
        return


class Reports(Report):
    """Several as one."""

    def __init__(self, each: list[Report]) -> None:
        self.each = each

    def row(self, row: Row) -> None:
        for one in self.each:
            one.row(row)

    def step(self, row: Row) -> None:
        for one in self.each:
            one.step(row)

    def close(self) -> None:
        for one in reversed(self.each):
            one.close()


class Told(Report):
    """A function that wants the rows."""

    def __init__(self, function: Callable[[Row], None]) -> None:
        self.function = function

    def row(self, row: Row) -> None:
        self.function(row)


class MetricsFile(Report):
    """`metrics.jsonl` in the run's folder: a JSON object a line.

    A resumed run goes on behind its checkpoint's rows; one that starts anew sets the rows that it finds aside, as
    `metrics-1.jsonl`, `metrics-2.jsonl` …
    """

    def __init__(self, out: Path, resumed_at: int | None = None) -> None:
        self.path = out / METRICS
        kept = [] if resumed_at is None else [r for r in read_metrics(out) if int(r.get("step", 0)) <= resumed_at]
        kept = [r for r in kept if r.get("event") != "end"]
        with writing(out):
            sweep(out, METRICS)
            if resumed_at is None:
                set_aside(self.path)
            replace_file(self.path, "".join(_line(r) for r in kept).encode())

    def row(self, row: Row) -> None:
        with writing(self.path):
            disk.append(self.path, _line(row).encode())


def set_aside(path: Path) -> None:
    """Rename a file that is not empty to the first free name: `metrics-1.jsonl` …"""
    if not path.is_file() or not path.stat().st_size:
        return
    free = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
    disk.rename(path, next(to for to in free if not to.exists()))


def _line(row: Row) -> str:
    return json.dumps(dict(row), ensure_ascii=False) + "\n"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The rows of a run; a last line that was cut off is left out."""
    path = out / METRICS
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Progress(Report):
    """One line on standard error: bar, loss, rate, tokens a second, time left, memory."""

    def __init__(self, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task("train", total=total, completed=done, values="")
        self.bar.start()

    def row(self, row: Row) -> None:
        if row["event"] == "eval":
            values = ", ".join(f"{k} {v:.4g}" for k, v in row["metrics"].items())
            self.bar.console.print(one_line(f"step {row['step']}: {values}"), markup=False)

    def step(self, row: Row) -> None:
        speed = row.get("tokens_per_second")
        values = f"loss {row['loss']:.4f}  lr {row['lr']:.2e}" + (f"  {speed:,.0f} tok/s" if speed else "")
        values += f"  {row['memory_mb']:,.0f} MB"
        self.bar.update(self.task, completed=row["step"], values=values)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self.bar.stop()


def on_terminal() -> bool:
    """True where a person is watching, and nobody takes down what is printed."""
    return sys.stderr.isatty() and sys.stdout.isatty() and not os.environ.get("CI")


def memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3


class Tracker(Report):
    """A tracker that takes numbers by name and step; training values as `train/…`, evaluation as `eval/…`."""

    def __init__(self, log: Callable[[dict[str, float], int], None], end: Callable[[], Any]) -> None:
        self.log = log
        self.end = end

    def row(self, row: Row) -> None:
        kind = row["event"]
        values = row["metrics"] if kind == "eval" else row if kind == "train" else {}
        numbers = {f"{kind}/{k}": float(v) for k, v in values.items() if isinstance(v, (int, float)) and k != "step"}
        if numbers:
            self.log(numbers, int(row["step"]))

    def close(self) -> None:
        self.end()


def tracker(name: str, out: Path | None, config: Mapping[str, Any]) -> Tracker:
    """The tracker `name`, opened. Raises `SettingsError` for an unknown name, `MissingExtra` if it is not installed."""
    if name not in _OPENERS:
        raise SettingsError(f"report_to={name!r}{suggest(name, _OPENERS)}")
    if importlib.util.find_spec(name) is None:
        if name in ("tensorboard", "trackio"):
            raise MissingExtra(name, "track", f"report_to={name!r}")
        raise SettingsError(f"report_to={name!r} needs the package {name!r}: pip install {name}")
    return _OPENERS[name](out, dict(config))


def _tensorboard(out: Path | None, config: dict[str, Any]) -> Tracker:
    if out is None:
        raise SettingsError("report_to='tensorboard' writes below out=…, which is not given")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))
    writer.add_text("settings", json.dumps(config, indent=1))

    def log(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return Tracker(log, writer.close)


def _trackio(out: Path | None, config: dict[str, Any]) -> Tracker:
    import trackio

    trackio.init(project="rankloom", name=out.name if out else None, config=config)
    return Tracker(lambda values, step: trackio.log(values, step=step), trackio.finish)


def _wandb(out: Path | None, config: dict[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(project="rankloom", name=out.name if out else None, dir=out, config=config)
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


def _mlflow(out: Path | None, config: dict[str, Any]) -> Tracker:
    import mlflow

    mlflow.start_run(run_name=out.name if out else None)
    mlflow.log_params(config)
    return Tracker(lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run)


_OPENERS: dict[str, Callable[[Path | None, dict[str, Any]], Tracker]] = {
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}
