"""The loss curve as a picture and in text."""

from __future__ import annotations

import math
import struct
import sys
import zlib

import pytest

from rankloom.errors import MissingExtra
from rankloom.train.curve import drawn, picture, points

ROWS = [
    {"event": "start", "step": 0},
    {"event": "eval", "step": 0, "metrics": {"loss": 4.0}},
    *({"event": "train", "step": step, "loss": 4.0 / step} for step in range(1, 41)),
    {"event": "train", "step": 41, "loss": math.inf},
    {"event": "eval", "step": 40, "metrics": {"accuracy": 1.0}},
]


def test_points_are_finite_losses_of_one_event():
    assert points(ROWS)[:2] == [(1, 4.0), (2, 2.0)]
    assert len(points(ROWS)) == 40
    assert points(ROWS, "eval") == [(0, 4.0)]


def pixels(png: bytes) -> bytes:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, data = 8, b""
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    return zlib.decompress(data)


def test_the_picture_shows_the_losses():
    pytest.importorskip("matplotlib")
    one, other = pixels(picture(ROWS)), pixels(picture(ROWS[:20]))
    assert len(one) > 100_000
    assert one != other
    assert picture([])


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"rankloom\[plot\]"):
        picture(ROWS)


@pytest.mark.parametrize("height", [2, 8])
def test_the_text_falls_as_the_losses_do(height):
    lines = drawn(points(ROWS), width=40, height=height).splitlines()
    assert len(lines) == height + 2
    marks = [line.partition("│")[2] for line in lines[:height]]
    assert marks[0].startswith("•")
    assert marks[-1].rstrip().endswith("•")
    assert sum(mark.count("•") for mark in marks) == 40
    assert lines[0].split()[0] == "4"
    assert "step 40" in lines[-1]


def test_flat_short_and_empty_curves_are_drawn_too():
    assert drawn([(1, 2.0)], 20, 4).count("•") == 1
    assert drawn([(1, 2.0), (9, 2.0)], 20, 4).count("•") == 2
    assert drawn([]) == "no losses"
