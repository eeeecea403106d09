"""The quick part of every row holds, and (slow) each of its sabotages is noticed.

Each row has a process of its own: rows fork, which a process that ever ran a backward pass in threads cannot.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reliability_board import board

SCRIPT = Path(__file__).parents[2] / "bench" / "reliability.py"


def measured(number, *options):
    command = [sys.executable, str(SCRIPT), "--row", str(number), "--quick", "--json", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    return json.loads(done.stdout)["rows"][0], done.stderr


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", board.numbers())
def test_row(number):
    row, said = measured(number)
    assert row["ok"], f"{row['figure']}\n{said[-2000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", board.numbers())
def test_every_sabotage_turns_the_row_red(number):
    row, said = measured(number, "--sabotage")
    assert row["sabotage_red"] is True, said[-2000:]
