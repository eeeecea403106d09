"""Named streams in `fit`: one batch of each in a step, each with its own order and position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from train_world import Interrupted, breaking_at, mlp, points, tensors_of

import rankloom as rl
from rankloom.errors import SettingsError, StateError
from rankloom.train.fit import fit
from rankloom.train.settings import TrainSettings


def lora() -> nn.Module:
    model = mlp()
    torch.manual_seed(1)
    rl.attach(model, rl.LoRA(r=2), target_modules=["0", "2"])
    return model


def both(model: nn.Module, streams: Any) -> torch.Tensor:
    """Squared error on one stream, minus a little of it on the other."""
    (x, y), (u, v) = streams["retain"], streams["forget"]
    return nn.functional.mse_loss(model(x), y) - 0.1 * nn.functional.mse_loss(model(u), v)


def equal(a: nn.Module, b: nn.Module) -> bool:
    one, two = tensors_of(a), tensors_of(b)
    return all(torch.equal(one[k], two[k]) for k in one)


def test_one_stream_is_plain_fit():
    """A mapping of one stream without a loss of its own: the same bits, accumulation included."""
    plain, named = lora(), lora()
    settings = TrainSettings(steps=5, lr=0.05, accumulate=2)
    first = fit(plain, points(3), settings=settings)
    second = fit(named, {"only": points(3)}, settings=settings)
    assert first.losses == second.losses
    assert equal(plain, named)


def test_each_stream_goes_round_by_itself():
    """A step draws one batch of each; streams of different lengths begin anew by themselves."""
    drawn: list[tuple[int, int]] = []

    def loss(model, streams):
        drawn.append((streams["a"], streams["b"]))
        return model[0].weight.sum() * 0 + sum(p.square().sum() for _, p, _ in model.rankloom.trainable())

    fit(lora(), {"a": [0, 1, 2], "b": lambda i: 10 * i}, steps=5, loss=loss)
    assert drawn == [(0, 0), (1, 10), (2, 20), (0, 30), (1, 40)]


def test_resume_is_exact_with_shuffling(tmp_path):
    """Every stream goes on at its own place in its own shuffled order."""

    def streams():
        one, two = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        each = [(x[0], y[0]) for x, y in points(7)]
        return {
            "retain": DataLoader(each, 2, shuffle=True, generator=one),
            "forget": DataLoader(each[:5], 2, shuffle=True, generator=two),
        }

    settings = TrainSettings(steps=9, lr=0.05, save_every=5)
    straight, broken, again = lora(), lora(), lora()
    fit(straight, streams(), loss=both, settings=settings, out=tmp_path / "a")
    with pytest.raises(Interrupted):
        fit(broken, streams(), loss=both, settings=settings, out=tmp_path / "b", report=breaking_at(5))
    torch.rand(5)
    fit(again, streams(), loss=both, settings=settings, out=tmp_path / "b", resume=True)
    assert equal(straight, again)
    more = {"retain": points(3), "other": points(3)}
    with pytest.raises(StateError, match=r"'retain', 'forget'.*'retain', 'other'"):
        fit(lora(), more, loss=both, settings=settings, out=tmp_path / "b", resume=tmp_path / "b" / "checkpoints")


def test_streams_without_a_loss_are_refused():
    """Not silent: several streams and nobody who reads them; no stream at all; names that are none."""
    with pytest.raises(SettingsError, match=r"'retain', 'forget'.*loss="):
        fit(lora(), {"retain": points(1), "forget": points(1)}, steps=1)
    with pytest.raises(SettingsError, match="name each stream"):
        fit(lora(), {}, steps=1, loss=both)
    with pytest.raises(SettingsError, match="name each stream"):
        fit(lora(), {1: points(1)}, steps=1, loss=both)
