"""What is saved can be loaded again, is of one step, and says what it leaves behind."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_tiny import X, adapted, net, shake
from safetensors.torch import load_file
from torch import nn

import rankloom as rl
from rankloom.errors import StateError, TargetError
from rankloom.train.settings import TrainSettings

NAMES = (
    "base_layer",
    "adapters",
    "lora_A",
    "modules_to_save",
    "original_module",
    "default",
    "shared",
    "layer",
    "weight",
)


class Named(nn.Module):
    """A layer of an awkward name, perhaps in a module of one."""

    def __init__(self, *path: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.path = nn.Linear(16, 16), path
        held: nn.Module = self
        for part in path[:-1]:
            held.add_module(part, nn.Module())
            held = held._modules[part]  # type: ignore[assignment]
        held.add_module(path[-1], nn.Linear(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(".".join(self.path))(self.first(x))


@pytest.mark.parametrize("method", [rl.LoRA(r=2), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=2)], ids=repr)
@pytest.mark.parametrize("above", [(), ("x",), ("adapters",), ("base_layer",), ("x", "base_layer", "rankloom")])
def test_layers_of_any_name_come_back(above: tuple[str, ...], method: Any, tmp_path: Path) -> None:
    x = torch.randn(3, 16)
    for name in NAMES:
        model, base = Named(*above, name), Named(*above, name)
        shake(rl.attach(model, method))
        assert len(list(model.rankloom.adapters())) == 2
        rl.save(model, tmp_path / name)
        rl.load(base, tmp_path / name)
        assert torch.allclose(model(x), base(x), atol=1e-6)
        assert not torch.allclose(Named(*above, name)(x), base(x), atol=1e-3)


def test_peft_reads_a_layer_called_base_layer(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = Named("x", "base_layer"), torch.randn(3, 16)
    shake(rl.attach(model, rl.LoRA(r=2)))
    rl.save(model, tmp_path)
    assert torch.allclose(
        peft.PeftModel.from_pretrained(Named("x", "base_layer"), str(tmp_path))(x), model(x), atol=1e-5
    )


def test_what_sits_where_the_bank_belongs_is_named(tmp_path: Path) -> None:
    model = net()
    shake(rl.attach(model, rl.LoRA(r=2)))
    rl.save(model, tmp_path)
    for other in (Named("rankloom"), Named("rankloom", "x")):
        before = list(other.state_dict())
        for call in (lambda m: rl.attach(m, rl.LoRA(r=2)), lambda m: rl.load(m, tmp_path)):
            with pytest.raises(
                TargetError, match="this Named has an attribute 'rankloom' of its own .a (Linear|Module)"
            ):
                call(other)
        assert list(other.state_dict()) == before
        assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("how", [{"target_modules": ["1"]}, {"target_modules": ["0"], "modules_to_save": ["1"]},
                                 {"target_parameters": ["1.weight"], "target_modules": ()}])  # fmt: skip
def test_complex_layers_are_refused_by_name(how: Any, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).to(dtype))
    with pytest.raises(TargetError, match=rf"'1(\.weight|\.bias)?' is {dtype}: no file of adapters holds complex"):
        rl.attach(model, rl.LoRA(r=2), **how)
    assert not hasattr(model, "rankloom")
    assert len(rl.attach(model, rl.LoRA(r=2), target_modules=["0"]).names) == 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: p.fill_(4e9), r"has values of size 4e\+09; at most 10000 is read"),
        (lambda p: p.fill_(float("inf")), "has NaN or infinite values"),
    ],
)
def test_what_could_not_be_loaded_is_not_written(spoil: Any, words: str, tmp_path: Path) -> None:
    model = adapted()
    rl.save(model, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    with torch.no_grad():
        spoil(next(iter(model.rankloom.trainable()))[1])
    with pytest.raises(StateError, match=words):
        rl.save(model, tmp_path / "a")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before


def test_settings_over_the_limits_are_not_written(tmp_path: Path) -> None:
    model = net()
    rl.attach(model, rl.LoRA(r=2, lora_alpha=2e6))
    with pytest.raises(StateError, match=r"could not be loaded again, and nothing is written.*lora_alpha"):
        rl.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_values_over_the_limits_do_not_end_a_run(tmp_path: Path) -> None:
    """Its checkpoints hold them; they are no adapter folders, and that is told."""
    model = adapted()
    with torch.no_grad():
        next(iter(model.rankloom.trainable()))[1].fill_(1e5)
    with pytest.warns(UserWarning, match="no adapter folders.*at most 10000 is read"):
        found = rl.fit(model, [(X, torch.zeros_like(model(X)))], settings=TrainSettings(steps=1, lr=1e-3), out=tmp_path)
    assert not (found.checkpoint / "adapter_config.json").exists()


def one_step(model: nn.Module, batch: Any) -> torch.Tensor:
    return sum(p.sum() for _, p, _ in model.rankloom.trainable())  # type: ignore[return-value]


def test_a_save_in_the_middle_of_training_is_of_one_step(tmp_path: Path) -> None:
    """Every entry moves by the same amount in each step, so entries of different steps would tell."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(40)])
    bank = rl.attach(model, rl.LoRA(r=2))
    with torch.no_grad():
        for _, p, _ in bank.trainable():
            p.zero_()
    ended, seen, torn = threading.Event(), set(), []

    def saving() -> None:
        while not ended.is_set():
            rl.save(model, tmp_path / "a")
            values = {
                round(float(v), 4)
                for t in load_file(tmp_path / "a" / "adapter_model.safetensors").values()
                for v in t.flatten()
            }
            seen.update(values)
            torn.extend([values] if len(values) > 1 else [])

    thread = threading.Thread(target=saving)
    thread.start()
    chosen = TrainSettings(steps=150, lr=0.01, schedule="constant", clip=None, log_every=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rl.fit(model, [torch.zeros(1)], loss=one_step, settings=chosen)
    ended.set()
    thread.join()
    assert not torn
    assert len(seen) > 2


def test_the_lock_is_held_in_a_step_and_not_between(tmp_path: Path) -> None:
    """What a rule sees: another thread cannot copy while tensors change, and can when the step is done."""
    held: dict[str, bool] = {}
    model = adapted()

    def free() -> bool:
        found: list[bool] = []

        def look() -> None:
            taken = model.rankloom.lock._lock.acquire(blocking=False)
            found.append(taken)
            if taken:
                model.rankloom.lock._lock.release()

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return found[0]

    class Looking(rl.Rule):
        def before_step(self, run: Any) -> None:
            held["before_step"] = not free()

        def after_backward(self, run: Any) -> None:
            held["after_backward"] = not free()

        def after_step(self, run: Any) -> None:
            held["after_step"] = not free()

    def report(row: Any) -> None:
        held[row["event"]] = not free()

    target = torch.zeros_like(model(X))
    rl.fit(model, [(X, target)], steps=2, rules=[Looking()], report=report)
    assert held == {
        "before_step": True, "after_backward": True, "after_step": True, "start": False, "train": False, "end": False,
    }  # fmt: skip


def test_a_model_with_a_lock_is_copied_and_pickled() -> None:
    model = adapted()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
        with model.rankloom.lock, twin.rankloom.lock:
            assert twin.rankloom.lock is not model.rankloom.lock


@pytest.mark.parametrize("gone", ["a", "b", "c", None])
def test_detaching_a_merged_adapter_leaves_the_others_merged(gone: str | None) -> None:
    model = net()
    for seed, name in enumerate(("a", "b", "c")):
        shake(rl.attach(model, rl.LoRA(r=2), name), name, 0.2 + 0.1 * seed)
    before = {k: v.clone() for k, v in net().state_dict().items()}
    model.rankloom.merge(a=1.0, b=0.5)
    expected = copy.deepcopy(model)
    if gone in ("a", "b"):
        expected.rankloom.unmerge()
        expected.rankloom.merge(**{n: w for n, w in (("a", 1.0), ("b", 0.5)) if n != gone})
    answer = expected(X)
    rl.detach(model, gone)
    if gone is None:
        assert not hasattr(model, "rankloom")
    else:
        assert set(model.rankloom.merged) == {"a", "b"} - {gone}
        assert torch.equal(model(X), answer)
        assert not torch.allclose(answer, net()(X))
        rl.detach(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
