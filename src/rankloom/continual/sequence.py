"""Train on tasks one after the other, and measure all of them after each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from rankloom.continual.results import Results
from rankloom.errors import SettingsError, StateError
from rankloom.files.folders import replace_file
from rankloom.files.strict import as_json
from rankloom.train.checkpoint import FORM, load_checkpoint, model_tensors, restore_weights, save_checkpoint

Task = TypeVar("Task")
TABLE, STATES = "results.json", "tasks"


def sequence(
    model: nn.Module,
    tasks: Mapping[str, Task],
    how: Callable[[nn.Module, str, Task, Path | None], object],
    evaluate: Callable[[nn.Module, str, Task], float],
    out: str | Path | None = None,
) -> Results:
    """Train `model` on each of `tasks` in their order with `how`; returns R[t, i].

    Args:
        model: changed in place, with its adapters attached.
        tasks: name → what `how` and `evaluate` make use of.
        how: `how(model, name, task, folder)` trains, such as `fit(model, task.train, out=folder, resume="auto")`;
            `folder` is the task's own, None without `out`.
        evaluate: `evaluate(model, name, task)` → a score of one task, higher is better; of all tasks before the first
            and after each.
        out: keeps the table and the active adapters after each task. Called again with a fresh model of the same kind,
            the sequence goes on after the last task that was finished.

    Raises:
        SettingsError: no tasks. StateError: `out` holds a sequence of other tasks, or adapters that this model lacks.
    """
    if not tasks:
        raise SettingsError("sequence: there are no tasks")
    folder = None if out is None else Path(out)
    results = _found(model, tuple(tasks), folder)
    if results is None:
        results = Results(tuple(tasks), tuple(_scores(model, tasks, evaluate)))
        _keep(model, results, folder)
    for number, (name, task) in list(enumerate(tasks.items()))[len(results.rows) :]:
        how(model, name, task, None if folder is None else folder / f"{number:03d}-{_plain(name)}")
        results = results.after(_scores(model, tasks, evaluate))
        _keep(model, results, folder)
    return results


def _scores(
    model: nn.Module, tasks: Mapping[str, Task], evaluate: Callable[[nn.Module, str, Task], float]
) -> list[float]:
    return [float(evaluate(model, name, task)) for name, task in tasks.items()]


def _keep(model: nn.Module, results: Results, folder: Path | None) -> None:
    """The adapters first, then the table that says that the task is finished."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / STATES, len(results.rows), model_tensors(model), {})
    table = {"tasks": list(results.names), "before": list(results.before), "rows": [list(r) for r in results.rows]}
    replace_file(folder / TABLE, as_json(table))


def _found(model: nn.Module, names: tuple[str, ...], folder: Path | None) -> Results | None:
    """What `folder` holds, with the model brought to where it stood."""
    if folder is None or not (folder / TABLE).exists():
        return None
    table: dict[str, Any] = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    if tuple(table["tasks"]) != names:
        raise StateError(
            f"{folder} holds a sequence of {', '.join(map(repr, table['tasks']))}, these tasks are "
            f"{', '.join(map(repr, names))}: take another out="
        )
    results = Results(names, tuple(table["before"]), tuple(map(tuple, table["rows"])))
    state = load_checkpoint(folder / STATES / FORM.format(len(results.rows)))
    restore_weights(model, state.weights, state.folder.name)
    return results


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:40]
