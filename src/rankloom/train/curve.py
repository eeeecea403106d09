"""The loss curve of a run, from the rows of its metrics: as a picture, and drawn in text."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from rankloom.errors import MissingExtra

PICTURE = "loss.png"
Points = list[tuple[int, float]]
"""(step, loss), by step."""


def points(rows: Iterable[Mapping[str, Any]], event: str = "train") -> Points:
    """The finite losses that rows of one event tell."""
    found = [(row["step"], (row["metrics"] if event == "eval" else row).get("loss")) for row in rows
             if row.get("event") == event]  # fmt: skip
    return [(int(step), float(loss)) for step, loss in found if loss is not None and math.isfinite(loss)]


def picture(rows: Iterable[Mapping[str, Any]], title: str = "") -> bytes:
    """Training and evaluation loss over steps as a PNG. Raises `MissingExtra` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("matplotlib", "plot", f"a picture of the loss curve ({PICTURE})") from error
    rows = list(rows)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for event, label, style in (("train", "training", "-"), ("eval", "evaluation", "o--")):
        if found := points(rows, event):
            axes.plot(*zip(*found), style, label=label, markersize=4, linewidth=1.2)
            axes.legend()
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    kept = io.BytesIO()
    figure.savefig(kept, format="png", dpi=120)
    return kept.getvalue()


def drawn(curve: Points, width: int = 60, height: int = 8) -> str:
    """The curve in text: a column is the mean of its steps, rows go from the lowest loss to the highest."""
    if not curve:
        return "no losses"
    first, last = curve[0][0], curve[-1][0]
    columns: dict[int, list[float]] = {}
    for step, loss in curve:
        columns.setdefault(round((step - first) / max(1, last - first) * (width - 1)), []).append(loss)
    means = {column: sum(losses) / len(losses) for column, losses in columns.items()}
    low, high = min(means.values()), max(means.values())
    level = {column: round((high - mean) / ((high - low) or 1) * (height - 1)) for column, mean in means.items()}
    lines = []
    for row in range(height):
        label = f"{high - (high - low) * row / (height - 1):9.4g}" if row in (0, height - 1) else " " * 9
        marks = "".join("•" if level.get(column) == row else " " for column in range(width))
        lines.append(f"{label} │{marks.rstrip()}")
    return "\n".join([*lines, f"{'':9} └{'─' * width}", f"{'loss':>9}  {first:<{width - 8}}{f'step {last}':>8}"])
