"""The board's own machinery: rows are found, sabotages are entered, children cannot hurt, the command says the truth."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import time
from pathlib import Path

import pytest
import typer
from reliability_board import board
from reliability_board.board import Budget, Finding, Row, Sabotage, run, swapped
from reliability_board.child import forked
from typer.testing import CliRunner

from rankloom.errors import SettingsError


class Product:
    safe = True


def honest(budget: Budget) -> Finding:
    return Finding(Product.safe, f"{budget.of(100, 7)} tries", () if Product.safe else ("it is unsafe",))


BREAK = Sabotage("unsafe", lambda: swapped(Product, "safe", False))
NOTHING = Sabotage("nothing", contextlib.nullcontext)


def test_a_sabotage_that_is_noticed_and_one_that_is_not():
    plain = run(Row(90, "p", honest, (BREAK,)), Budget())
    assert (plain.finding.figure, plain.sabotage_red, plain.ok) == ("100 tries", None, True)
    red = run(Row(90, "p", honest, (BREAK,)), Budget(quick=True), sabotage=True)
    assert (red.finding.figure, red.sabotage_red, red.ok) == ("7 tries", True, True)
    sham = run(Row(90, "p", honest, (BREAK, NOTHING)), Budget(), sabotage=True)
    assert (sham.green, sham.sabotage_red, sham.ok) == (("nothing",), False, False)
    assert Product.safe


def test_every_row_is_what_its_file_says():
    there = board.numbers()
    assert there == sorted(set(there))
    for number, row in zip(there, board.rows(), strict=True):
        assert row.number == number
        assert row.promise
        assert row.sabotages, f"row {number} has no sabotage: nothing shows that it can fail"
        assert len({s.name for s in row.sabotages}) == len(row.sabotages)
        for sabotage in row.sabotages:
            with sabotage.apply():
                """What it breaks is there to be broken."""


def test_a_row_that_is_not_there():
    with pytest.raises(SettingsError, match="no row 99"):
        board.row(99)


@pytest.fixture
def planted(monkeypatch):
    found = Row(90, "a promise", honest, (BREAK,))
    monkeypatch.setattr(board, "numbers", lambda: [90])
    monkeypatch.setattr(board, "row", lambda number: found)
    return found


SCRIPT = Path(__file__).parents[2] / "bench" / "reliability.py"


def call(*words):
    app = typer.Typer()
    app.command()(runpy.run_path(str(SCRIPT))["reliability"])
    return CliRunner().invoke(app, words)


def test_the_command_prints_the_rows(planted):
    done = call("--sabotage", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "rows": [{"row": 90, "promise": "a promise", "ok": True, "figure": "100 tries", "sabotage_red": True}]
    }
    assert "seed 20260" in done.stderr
    assert "100 tries" in call().stdout
    assert "7 tries" in call("--quick").stdout


def test_the_command_fails_when_a_promise_or_a_sabotage_fails(planted, monkeypatch):
    with swapped(Product, "safe", False):
        done = call()
        assert done.exit_code == 1
        assert "it is unsafe" in done.stderr
    monkeypatch.setattr(board, "row", lambda number: Row(90, "p", honest, (NOTHING,)))
    assert call().exit_code == 0
    done = call("--sabotage")
    assert done.exit_code == 1
    assert "'nothing' was not noticed" in done.stderr


def test_children_answer_hang_die_and_fail():
    assert forked(lambda: {"a": [1]}).value == {"a": [1]}
    start = time.perf_counter()
    assert forked(lambda: time.sleep(60), seconds=0.3).died == "hang"
    assert time.perf_counter() - start < 5
    assert forked(lambda: sum(1 for _ in iter(int, 1)), seconds=100, cpu=1).died == "hang"
    assert forked(lambda: os._exit(3)).died == "exit 3"
    assert forked(lambda: os.kill(os.getpid(), 9)).died == "signal 9"
    assert "ZeroDivisionError" in forked(lambda: 1 // 0).died


def test_children_have_limits_and_their_memory_is_measured():
    assert forked(lambda: len(bytearray(40 << 20))).memory > 39 << 20
    assert forked(lambda: 1).memory < 8 << 20
    assert "MemoryError" in forked(lambda: len(bytearray(400 << 20)), memory=200 << 20).died
