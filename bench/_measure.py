"""What the gate scripts share: CPU time interleaved in one process, and the rows of bench/results/gates.json."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
ROUNDS = 7


@dataclass(frozen=True)
class Gate:
    """One gate: what we reach, what PEFT and the limit reach (None: not there), and the largest value that passes."""

    gate: str
    ours: float
    peft: float | None
    limit: float | None
    bound: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.bound


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of `clock` of every variant in every round, in random order within a round, after one warm-up."""
    order, shuffle = list(variants), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            began = clock()
            variants[name]()
            if number:
                times[name].append(clock() - began)
    return times


def ratios(times: Mapping[str, Sequence[float]], to: str) -> dict[str, float]:
    """The median over rounds of each variant's time beside that of `to` in the same round."""
    return {name: statistics.median(t / u for t, u in zip(found, times[to])) for name, found in times.items()}


def record(gates: Sequence[Gate], name: str = "gates.json") -> None:
    """Print the rows and put them in the place of those of the same names in a file of results."""
    path = RESULTS / name
    rows = {row["gate"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    for gate in gates:
        rows[gate.gate] = {**{k: _short(v) for k, v in asdict(gate).items()}, "ok": gate.ok}
        print(
            f"{gate.gate:40} ours {shown(gate.ours)}   PEFT {shown(gate.peft)}   limit {shown(gate.limit)}   "
            f"bound {shown(gate.bound)}   {'ok' if gate.ok else 'MISSED'}"
        )
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps([rows[name] for name in sorted(rows)], indent=1) + "\n")


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _short(value: float | str | None) -> float | str | None:
    return float(f"{value:.4g}") if isinstance(value, float) else value
