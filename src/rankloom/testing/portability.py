"""Files, JSON, copies, pickles and other dtypes."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankloom.core.attach import attach, bank_of
from rankloom.core.bank import Bank
from rankloom.core.plan import plan_data, plan_from_data
from rankloom.core.site import LAYER
from rankloom.errors import SettingsError
from rankloom.testing.subject import Subject, Unfit, cast, difference, mapped, nudge, same, trained, training


def settings(subject: Subject) -> None:
    """the plan survives JSON: what is built from it is the same"""
    try:
        text = json.dumps(plan_data(subject.plan))
    except (SettingsError, TypeError) as error:
        raise AssertionError(f"plan_data: {error}; settings are numbers, strings, lists, registered parts") from error
    try:
        plan = plan_from_data(json.loads(text))
    except SettingsError as error:
        raise AssertionError(
            f"{text} cannot be read back: {error}. Is the method registered? "
            "rankloom.register('its_name', 'package.module:Class')"
        ) from error
    assert plan_data(plan) == json.loads(text), f"read back and written again it is {plan_data(plan)}, it was {text}"
    assert plan.method == subject.plan.method, f"read back it is {plan.method}, it was {subject.plan.method}"
    model, _ = subject.nudged()
    twin = subject.model()
    torch.manual_seed(0)
    nudge(trained(attach(twin, plan), "default"))
    same(subject.output(twin), subject.output(model), f"an adapter built from {text}, against the original")


def save_load(subject: Subject) -> None:
    """saved and loaded onto a fresh base it is bitwise the same"""
    from rankloom.formats import load, save

    model, bank = subject.nudged()
    said = subject.outputs(model)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder, "adapter"), name="default")
        fresh = subject.model()
        torch.manual_seed(99)
        again = load(fresh, Path(folder, "adapter"), name="default")
    again.use("default")
    fresh.eval()
    for number, (now, wanted) in enumerate(zip(subject.outputs(fresh), said)):
        same(now, wanted, f"batch {number} after save and load (is a tensor not saved, or a seed not kept?)")
    found = {key: p for key, p, _ in again.tensors("default")}
    for key, parameter, _ in bank.tensors("default"):
        assert key in found, f"{key!r} is missing after save and load"
        same(found[key].detach(), parameter.detach(), f"{key!r} after save and load")
        assert found[key].requires_grad == parameter.requires_grad, f"{key!r}: requires_grad is lost by save and load"


def state(subject: Subject) -> None:
    """its tensors in memory make another model answer bitwise the same, and are copies"""
    model, bank = subject.nudged()
    said, tensors = subject.output(model), bank.state("default")
    twin, other = subject.adapted(seed=5)
    nudge(trained(other, "default"), seed=5)
    other.load_state("default", tensors)
    same(subject.output(twin), said, "another model after load_state, against the one of the state")
    again = other.state("default")
    assert again.keys() == tensors.keys(), f"state gives other keys after load_state: {again.keys() ^ tensors.keys()}"
    for key, value in tensors.items():
        same(again[key], value, f"{key!r} after load_state")
    for value in tensors.values():
        value.zero_()
    same(subject.output(model), said, "the first model after its state's tensors were written to")


def copies(subject: Subject) -> None:
    """a deep copy answers the same and is independent"""
    model, _ = subject.nudged()
    _independent(subject, model, copy.deepcopy(model), "the deep copy")


def pickles(subject: Subject) -> None:
    """pickled and unpickled it answers the same and is independent"""
    try:
        pickle.dumps(subject.model())
    except Exception as error:
        raise Unfit(f"the model of make() cannot be pickled ({error}): define its classes in a module") from error
    model, _ = subject.nudged()
    _independent(subject, model, pickle.loads(pickle.dumps(model)), "the unpickled model")


def _independent(subject: Subject, model: nn.Module, twin: nn.Module, who: str) -> None:
    said = subject.output(model)
    same(subject.output(twin), said, f"{who} against the original")
    bank, other = bank_of(model), bank_of(twin)
    assert other.model is twin, f"the bank of {who} still steers the original: twin.rankloom.model is not the twin"
    held = {id(p) for _, p, _ in bank.tensors("default")} | {id(p) for p in model.parameters()}
    shared = [key for key, p, _ in other.tensors("default") if id(p) in held]
    assert not shared, f"{who} shares the tensor {shared[0]!r} with the original" if shared else ""
    nudge(trained(other, "default"), seed=3)
    same(subject.output(model), said, f"the original after the tensors of {who} were changed")
    gap = difference(subject.output(twin), said)
    assert gap > subject.limit(said), f"the tensors of {who} were changed and its output was not"
    other.use()
    same(subject.output(model), said, f"the original after {who} was switched to the base only")
    bank.use()
    other.use("default")
    assert difference(subject.output(twin), subject.output(model)) > 0, f"{who} was switched off with the original"


def moves(subject: Subject) -> None:
    """`.to()` takes all of it along, to another dtype and to another device"""
    _to_meta(subject)
    model, bank = subject.nudged()
    said = subject.output(model)
    other = torch.float32 if said.dtype == torch.float64 else torch.float64
    model.to(other)
    for key, parameter, _ in bank.tensors("default"):
        assert parameter.dtype == other, f"{key!r} is still {parameter.dtype} after model.to({other})"
    moved = _run_in(subject, model, other)
    assert moved.dtype == other, f"after model.to({other}) the output is {moved.dtype}"
    limit = max(subject.limit(said), 2000 * torch.finfo(torch.float32).eps)
    gap = difference(moved.to(said.dtype), said)
    assert gap <= limit, f"after model.to({other}) the output differs by {gap:.2g} (tolerance {limit:.2g})"
    bank.use()
    gap = difference(_run_in(subject, model, other), moved)
    assert gap > limit, f"after model.to({other}) the adapter changes nothing"


def _to_meta(subject: Subject) -> None:
    """Move to the device without values, where a tensor that was left behind is an error."""
    model, bank = subject.nudged()
    model.to("meta")
    batch = mapped(subject.batches[0], lambda t: t.to("meta"))
    left = [key for key, p, _ in bank.tensors("default") if not p.is_meta]
    assert not left, f"{left[0]!r} stayed behind when the model moved to another device" if left else ""
    with torch.no_grad():
        try:
            with bank.using():
                subject.run(model, batch)
        except Exception:  # the base itself looks at values
            return
        out = subject.run(model, batch)
    assert out.is_meta, "a tensor of the adapter stayed behind when the model moved to another device"


@torch.no_grad()
def _run_in(subject: Subject, model: nn.Module, dtype: torch.dtype) -> Tensor:
    return subject.run(model, cast(subject.batches[0], dtype)).detach()


def bf16(subject: Subject) -> None:
    """on a bfloat16 base outputs stay bfloat16 and finite, while the adapter trains in its own precision"""
    model = subject.model().to(torch.bfloat16)
    bank = subject.add(model, "default")
    kept = bank.plans["default"].dtype or "float32"
    for key, parameter, _ in bank.tensors("default"):
        wanted = getattr(torch, kept)
        assert parameter.dtype == wanted, f"{key!r} is {parameter.dtype} on a bfloat16 base, it should be {wanted}"
    with bank.using():
        base = _run_in(subject, model, torch.bfloat16)
    start = difference(_run_in(subject, model, torch.bfloat16), base)
    assert start < 0.1, f"at its start the adapter changes a bfloat16 base by {start:.2g} of the largest value"
    nudge(trained(bank, "default"))
    with _output_dtypes(bank) as seen:
        said = _run_in(subject, model, torch.bfloat16)
    for site, dtype in seen.items():
        assert dtype == torch.bfloat16, f"site {site!r} gives {dtype} on a bfloat16 base: cast factors to y.dtype"
    assert said.dtype == base.dtype, f"the output is {said.dtype} with the adapter and {base.dtype} without"
    assert bool(said.isfinite().all()), "the output in bfloat16 is not finite"
    assert difference(said, base) > 0, "on a bfloat16 base the adapter changes nothing"
    with training(model):
        subject.run(model, cast(subject.batches[0], torch.bfloat16)).float().square().mean().backward()  # type: ignore[no-untyped-call]
    for key, parameter, _ in bank.trainable("default"):
        bad = parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        assert not bad, f"the gradient of {key!r} on a bfloat16 base is not finite"


@contextmanager
def _output_dtypes(bank: Bank) -> Iterator[dict[str, torch.dtype]]:
    """The dtype of what each adapted layer gives, filled inside the block."""
    seen: dict[str, torch.dtype] = {}

    def watch(name: str) -> Any:
        def keep(layer: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output.dtype

        return keep

    hooks = [f.layer.register_forward_hook(watch(f.name)) for f in bank.sites("default") if f.slot == LAYER]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _same_dtypes_under_autocast(subject: Subject, model: nn.Module, bank: Bank, batch: Any) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with bank.using(), _output_dtypes(bank) as base:
            subject.run(model, batch)
        with _output_dtypes(bank) as adapted:
            subject.run(model, batch)
    for site, dtype in base.items():
        assert adapted[site] == dtype, (
            f"under autocast site {site!r} gives {dtype} alone and {adapted[site]} with the adapter: "
            "cast factors to y.dtype"
        )


def autocast(subject: Subject) -> None:
    """under autocast it keeps the dtypes of the base and comes near its answer in full precision"""
    model, bank = subject.nudged()
    if subject.output(model).dtype != torch.float32:
        model = model.float()
    batch = cast(subject.batches[0], torch.float32)
    with torch.no_grad():
        full = subject.run(model, batch)
        with bank.using():
            base = subject.run(model, batch)
    _same_dtypes_under_autocast(subject, model, bank, batch)
    with training(model), torch.autocast("cpu", torch.bfloat16):
        loss = subject.run(model, batch).float().square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = subject.run(model, batch).float()
    part = float((full - base).abs().max())
    gap = float((half - full).abs().max())
    assert gap < 0.5 * part + 0.1 * float(full.abs().max()), (
        f"under autocast the output is {gap:.2g} off the one in float32, where the adapter's whole part is {part:.2g}"
    )
    for key, parameter, _ in bank.trainable("default"):
        assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, f"the gradient of {key!r} is half"
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), f"the gradient of {key!r} overflowed"
