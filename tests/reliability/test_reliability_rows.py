"""The quick part of every row holds, and (slow) each of its sabotages is noticed."""

from __future__ import annotations

import pytest
import torch

from rankloom.reliability import board
from rankloom.reliability.board import Budget, run


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", board.numbers())
def test_row(number):
    result = run(board.row(number), Budget(quick=True))
    assert result.finding.ok, "\n".join((result.finding.figure, *result.finding.details[:20]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", board.numbers())
def test_every_sabotage_turns_the_row_red(number):
    assert run(board.row(number), Budget(quick=True), sabotage=True).green == ()
