"""Where the embedded base model lies, and how its demonstration skill is learnt."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict


class DemoSettings(TypedDict):
    """What the demonstration trains with: optimizer steps, peak learning rate of AdamW, examples a step."""

    steps: int
    lr: float
    batch_size: int


DEMO_TASK = "list_rotate"
DEMO: DemoSettings = {"steps": 150, "lr": 3e-3, "batch_size": 16}


def base_path() -> Path:
    """The folder of the shipped base model: a plain Hugging Face checkpoint with tokenizer and chat template."""
    return Path(__file__).parent / "base"
