"""A run told in lines of text: where no terminal shows a bar, and in `train.log` of the run's folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

from rankloom.files import disk
from rankloom.files.folders import sweep, writing
from rankloom.train.report import Report, Row, set_aside

LOG = "train.log"


class Lines(Report):
    """Hands `tell` a line for every row of metrics that a person wants: steps, evaluations, what interrupts them.

    `total`: steps of the run, `done` of them before. The time left is that of the steps so far, evaluations between
    them included.
    """

    def __init__(self, tell: Callable[[str], None], total: int, done: int) -> None:
        self.tell = tell
        self.total = total
        self.done = done
        self.began = time.monotonic()

    def row(self, row: Row) -> None:
        if row["step"] == self.done:
            self.began = time.monotonic()
        said = _SAID.get(row["event"])
        if said is not None:
            left = (self.total - row["step"]) * (time.monotonic() - self.began) / max(1, row["step"] - self.done)
            self.tell(f"step {row['step']}/{self.total}  {said(row, left)}")


def lines_for_people(total: int, done: int) -> Lines:
    """Lines on standard error; on standard output where that alone leads into a pipe or a file."""
    return Lines(lambda line: print(line, file=_stream(), flush=True), total, done)


def log_file(out: Path, total: int, done: int, *, resumed: bool) -> Lines:
    """Lines with their time into `train.log`; a run that starts anew sets an older one aside, as `train-1.log` …"""
    path = out / LOG
    with writing(out):
        sweep(out, LOG)
        if not resumed:
            set_aside(path)

    def tell(line: str) -> None:
        with writing(path):
            disk.append(path, f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}\n".encode())

    return Lines(tell, total, done)


def _stream() -> TextIO:
    piped = sys.stderr.isatty() and not sys.stdout.isatty()
    return sys.stdout if piped else sys.stderr


def _step(row: Row, left: float) -> str:
    speed = row.get("tokens_per_second")
    parts = [f"loss {row['loss']:.4f}", f"lr {row['lr']:.2e}", f"{speed:,.0f} tok/s" if speed else ""]
    return "  ".join([*filter(None, parts), f"ETA {clock(left)}"])


def values(metrics: Any) -> str:
    """Metrics in one line."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


_SAID: dict[str, Callable[[Row, float], str]] = {
    "train": _step,
    "eval": lambda row, left: f"evaluated: {values(row['metrics'])}",
    "resume": lambda row, left: f"goes on from {row['from']}",
    "skip": lambda row, left: f"skipped: the gradients overflowed; the scale is now {row['scale']:g}",
    "signal": lambda row, left: f"stopped by signal {row['signal']}",
    "end": lambda row, left: f"done ({row['stopped']}) after {clock(row['seconds'])}, {row['tokens']:,} tokens",
}
