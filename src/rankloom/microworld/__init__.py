"""A small closed world with a base model: data and weights for every example and test, with no download."""

from __future__ import annotations

from rankloom.microworld.base import DEMO, DEMO_TASK, base_path
from rankloom.microworld.splits import SPLITS, Split
from rankloom.microworld.table import documents, examples, held_out, stream, tasks

__all__ = ["DEMO", "DEMO_TASK", "SPLITS", "Split", "base_path", "documents", "examples", "held_out", "stream", "tasks"]
