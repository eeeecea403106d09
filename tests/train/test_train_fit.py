"""`fit` on any module: what trains, what stays, what stops it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from train_world import Interrupted, attached, base_of, llama, mlp, points, settings, tensors_of, texts

import rankloom as rl
from rankloom.core.plan import Plan
from rankloom.core.rule import Rule
from rankloom.errors import DataError, SettingsError, StateError, UnreachedError
from rankloom.train.fit import fit
from rankloom.train.guard import DivergedError
from rankloom.train.loss import count, one, shares, tokens
from rankloom.train.processes import Processes
from rankloom.train.settings import TrainSettings

LORA = Plan(rl.LoRA(r=3), target_modules=("o_proj", "up_proj"))


def planted(rows: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 6, generator=draw)
    return [(x, x @ torch.randn(6, 3, generator=draw))]


@pytest.mark.parametrize("noise", [1, 7])
@pytest.mark.parametrize("method", [rl.LoRA(r=3, lora_dropout=0.3), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=4)])
def test_a_run_repeats_whose_adapter_is_drawn_after_a_seed(method: Any, noise: int) -> None:
    def losses(drawn_before: int) -> list[float]:
        model = llama()
        torch.rand(drawn_before)
        torch.manual_seed(5)
        rl.attach(model, method)
        torch.rand(drawn_before)
        return fit(model, texts(), settings=settings(steps=3, seed=0), report=lambda row: None).losses

    assert losses(0) == losses(noise)


# What is learned.


def test_learns_a_planted_task_through_adapters_and_leaves_the_base_bitwise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    rl.attach(model, rl.LoRA(r=3), target_modules=["0"], modules_to_save=[], bias="all")
    before = base_of(model)
    result = fit(model, planted(), steps=300, lr=0.05)
    assert result.losses[0] > 1
    assert result.losses[-1] < 1e-4
    assert all(torch.equal(before[k], v) for k, v in base_of(model).items())
    with model.rankloom.using():
        x, y = planted()[0]
        assert ((model(x) - y) ** 2).mean() > 1


def test_plain_module_with_its_own_loss() -> None:
    model = mlp()
    result = fit(model, planted(), steps=200, lr=0.02, loss=lambda m, b: (m(b[0]) - b[1]).abs().mean())
    assert result.losses[-1] < 0.25 * result.losses[0]
    assert result.trainable == sum(p.numel() for p in model.parameters())
    assert result.steps == len(result.losses) == 200


def test_tuples_have_a_default_loss() -> None:
    model, x = mlp(), torch.randn(5, 6)
    classes, values = torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 3)
    expected = [nn.functional.cross_entropy(model(x), classes).item(), ((model(x) - values) ** 2).mean().item()]
    once = TrainSettings(steps=1)
    assert fit(mlp(), [(x, classes)], settings=once).losses == [expected[0]]
    assert fit(mlp(), [(x, values)], settings=once).losses == [expected[1]]


@pytest.mark.parametrize("batch", [torch.ones(2, 6), (torch.ones(2, 6),), "text"])
def test_a_batch_without_a_known_loss_is_refused(batch: Any) -> None:
    with pytest.raises(SettingsError, match="give loss=lambda model, batch"):
        fit(mlp(), [batch], steps=1)


def test_a_model_without_labels_is_refused() -> None:
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(SettingsError, match="gave no loss for this batch: put 'labels' into it"):
        fit(attached(llama, {"default": LORA}, 1), [batch], steps=1)


# What trains and what does not.


def test_only_active_adapters_train_and_flags_come_back() -> None:
    model = attached(llama, {"a": LORA, "b": LORA}, 1)
    model.rankloom.use("b")
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    before, base = tensors_of(model), base_of(model)
    seen: list[set[str]] = []

    class Look(Rule):
        def after_backward(self, run: Any) -> None:
            seen.append({n for n, p in run.model.named_parameters() if p.requires_grad or p.grad is not None})

    model.eval()
    fit(model, texts(), steps=3, rules=[Look()])
    assert seen[0]
    assert all(".b." in name for name in seen[0])
    after = tensors_of(model)
    assert all(torch.equal(before[k], after[k]) == k.startswith("a/") for k in before)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == frozen
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(base[k], v) for k, v in base_of(model).items())


def test_the_selection_of_a_block_trains() -> None:
    model = attached(llama, {"a": LORA, "b": LORA}, 1)
    model.rankloom.use("a")
    before = tensors_of(model)
    with model.rankloom.using("b"):
        fit(model, texts(), steps=2)
    after = tensors_of(model)
    assert all(torch.equal(before[k], after[k]) == k.startswith("a/") for k in before)
    assert list(model.rankloom.active) == ["a"]


def test_everything_is_put_back_after_an_error() -> None:
    model = attached(llama, {"default": LORA}, 1)
    model.eval()

    def batches(i: int) -> Any:
        if i:
            raise Interrupted
        return texts()[0]

    with pytest.raises(Interrupted):
        fit(model, batches, settings=settings(accumulate=1, gradient_checkpointing=True))
    assert not any(m.training for m in model.modules())
    assert not model.is_gradient_checkpointing
    assert all(p.grad is None for p in model.parameters())


def test_frozen_statistics_do_not_move_and_trained_ones_do() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    model = attached(make, {"default": Plan(rl.LoRA(r=2), target_modules=("0",), modules_to_save=("2",))}, 1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, points(), steps=3)
    after = model.state_dict()
    assert torch.equal(before["1.running_mean"], after["1.running_mean"])
    assert torch.equal(before["2.running_mean"], after["2.running_mean"]), "the base keeps its own"
    with torch.no_grad():
        assert not torch.equal(model[2].running_mean, after["2.running_mean"]), "the adapter has moved"


def test_base_tensors_that_ask_for_gradients_are_told() -> None:
    model = attached(mlp, {"default": Plan(rl.LoRA(r=2))}, 1)
    model[2].weight.requires_grad_(True)
    before = base_of(model)
    with pytest.warns(UserWarning, match="1 base tensors require gradients .'2.weight' …. but stay frozen"):
        fit(model, points(), steps=2)
    assert all(torch.equal(before[k], v) for k, v in base_of(model).items())
    assert model[2].weight.requires_grad


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(SettingsError, match="no parameter of this Sequential requires a gradient"):
        fit(mlp().requires_grad_(False), points(), steps=1)
    model = attached(mlp, {"default": Plan(rl.LoRA(r=2))}, 1)
    model.rankloom.use()
    with pytest.raises(StateError, match=r"no adapter is active, so none would train: bank.use\('default'\)"):
        fit(model, points(), steps=1)
    model.rankloom.use("default")
    model.rankloom.merge()
    with pytest.raises(StateError, match="'default' is merged into the base"):
        fit(model, points(), steps=1)
    with pytest.raises(StateError, match="meta device"):
        fit(mlp().to("meta"), points(), steps=1)


# Batches of unequal weight.


def test_accumulation_is_one_big_batch() -> None:
    small = texts(2)
    ids, labels = (torch.cat([b[k] for b in small]) for k in ("input_ids", "labels"))
    assert count(small[0]) != count(small[1])
    one, two = attached(llama, {"default": LORA}, 1), attached(llama, {"default": LORA}, 1)
    chosen = {"steps": 4, "lr": 0.01, "clip": 0.5}
    many = fit(one, small, settings=TrainSettings(accumulate=2, **chosen))
    big = fit(two, [{"input_ids": ids, "labels": labels}], settings=TrainSettings(**chosen))
    assert many.losses == pytest.approx(big.losses, rel=1e-5)
    for a, b in zip(tensors_of(one).values(), tensors_of(two).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_a_batch_counts_by_hand() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [1, -100, -100, 9]])
    assert count({"labels": labels}, first=False) == 3
    assert count({"labels": labels}) == count((None, labels)) == 5
    assert count({"labels": torch.tensor([1, 0, -100])}, first=False) == 2
    assert count({"labels": torch.rand(4)}) == count((labels, torch.rand(2, 2))) == 4
    assert count({"input_ids": labels}) == count((1, 2)) == one((1, 2)) == 1
    assert shares([{"labels": torch.tensor([1, 0, 0])}, {"labels": torch.tensor([1])}], count, Processes()) == [
        0.75,
        0.25,
    ]
    assert shares([1, 2], one, Processes()) == [0.5, 0.5]
    with pytest.raises(DataError, match="no label to train on in a whole step"):
        shares([{"labels": torch.tensor([-100])}] * 2, count, Processes())
    mask = torch.tensor([[1, 1, 0]])
    assert tokens({"input_ids": mask, "attention_mask": mask}) == 2
    assert tokens({"input_ids": mask}) == 3
    assert tokens((mask,)) == 0


def test_batches_that_end_are_told() -> None:
    with pytest.raises(DataError, match="An iterator or generator can be used once only"):
        fit(mlp(), iter(points(2)), steps=3)
    with pytest.raises(DataError, match="batches is empty"):
        fit(mlp(), [], steps=3)
    with pytest.raises(SettingsError, match="batches is a int"):
        fit(mlp(), 3, steps=3)  # type: ignore[arg-type]


# Precision, checkpointing, Accelerate.


def test_gradient_checkpointing_changes_nothing() -> None:
    plan = Plan(rl.DoRA(rl.LoRA(r=3, lora_dropout=0.1)), target_modules=("o_proj", "up_proj"))
    results = []
    for checkpointing in (False, True):
        model = attached(llama, {"default": plan}, 1)
        states: list[bool] = []

        def look(row: Any, model: Any = model, states: list[bool] = states) -> None:
            states.append(model.is_gradient_checkpointing)

        chosen = settings(steps=4, gradient_checkpointing=checkpointing)
        results.append((fit(model, texts(), settings=chosen, report=look).losses, tensors_of(model)))
        assert set(states) == {checkpointing}
        assert not model.is_gradient_checkpointing
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1].values(), results[1][1].values(), strict=True))
    with pytest.raises(SettingsError, match="Sequential has no gradient_checkpointing_enable"):
        fit(mlp(), points(), settings=settings(gradient_checkpointing=True))


def test_bfloat16_autocast_keeps_adapters_in_float32() -> None:
    seen: list[torch.dtype] = []

    class Look(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.lin(x)
            seen.append(y.dtype)
            return y

    model = Look()
    rl.attach(model, rl.LoRA(r=2))
    half = fit(model, points(), settings=settings(precision="bf16"), evaluate=points(2))
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    seen.clear()
    fit(model, points(), settings=settings())
    assert set(seen) == {torch.float32}
    assert half.metrics["after"]["loss"] > 0
    with pytest.raises(SettingsError, match="precision='fp16' needs a GPU"):
        fit(model, points(), settings=settings(precision="fp16"))


def test_accelerate_state_of_others_is_untouched() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    fit(mlp(), points(), settings=settings(precision="bf16"))
    assert not AcceleratorState._shared_state
    own = Accelerator(mixed_precision="bf16", cpu=True)
    fit(mlp(), points(), settings=settings(precision="no"))
    assert own.mixed_precision == AcceleratorState().mixed_precision == "bf16"
    AcceleratorState._reset_state(True)


# What stops a run.


class Half(nn.Module):
    """The second layer is there and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def test_a_dead_tensor_stops_the_run() -> None:
    model = Half()
    rl.attach(model, rl.LoRA(r=2))
    words = r"after 3 steps in 2 of 4 tensors: 'default/unused:A', 'default/unused:B'.*probe=batch"
    with pytest.raises(UnreachedError, match=words):
        fit(model, points(), steps=3)
    with pytest.raises(UnreachedError, match="after 20 steps in 2 of 4 tensors"):
        fit(model, points(), steps=30)
    with pytest.warns(UserWarning, match="no gradient after 3 steps in 2 of 4"):
        fit(model, points(), settings=settings(steps=3, dead_gradients="warn"))


def test_where_nothing_is_reached_the_first_step_tells() -> None:
    model = Half()
    rl.attach(model, rl.LoRA(r=2), target_modules=["unused"])
    before = tensors_of(model)
    with pytest.raises(UnreachedError):
        fit(model, points(), steps=3)
    assert all(torch.equal(before[k], v) for k, v in tensors_of(model).items())


class Dropped(Half):
    """Leaves a layer out at random (LayerDrop), or for the first steps."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.used(x)
        return y + self.unused(x) if not self.training or torch.rand(()) < 0.5 else y


def test_a_layer_that_is_dropped_at_random_is_no_dead_one() -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = Dropped()
        rl.attach(model, rl.LoRA(r=2))
        assert fit(model, points(), settings=settings(steps=25, seed=seed)).steps == 25


def test_zero_is_a_gradient() -> None:
    model = attached(mlp, {"default": Plan(rl.VeRA(r=4))}, 1)
    fit(model, points(), steps=2)
    assert fit(attached(mlp, {"default": Plan(rl.LoRA(r=2))}, 1), points(), steps=1).steps == 1


def test_a_loss_without_a_graph_is_told() -> None:
    with pytest.raises(UnreachedError, match="does not depend on any trainable tensor"):
        fit(mlp(), points(), steps=2, loss=lambda m, b: m(b[0]).detach().mean())
    with pytest.raises(rl.RankloomError, match=r"the loss has shape \(8,\)"):
        fit(mlp(), points(), steps=2, loss=lambda m, b: m(b[0]).mean(-1))


def test_a_loss_that_is_not_finite_stops_with_step_and_tensor() -> None:
    def batches(i: int) -> Any:
        x, y = points()[i]
        return x, y * (float("nan") if i == 2 else 1)

    model = attached(mlp, {"default": Plan(rl.LoRA(r=2))}, 1)
    with pytest.raises(DivergedError, match=r"step 3: the loss is not finite \(loss nan\); gradients not finite: "):
        fit(model, batches, steps=4)


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is_fine() -> None:
    class Trap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * float("inf")

    model = attached(mlp, {"default": Plan(rl.LoRA(r=2))}, 1)
    before = tensors_of(model)
    loss = lambda m, b: (Trap.apply(m(b[0])) - b[1]).pow(2).mean()  # noqa: E731
    with pytest.raises(
        DivergedError, match=r"step 1: the gradient is not finite .*gradients not finite: 'default/0:A'"
    ):
        fit(model, points(), steps=4, loss=loss)
    assert all(torch.equal(before[k], v) for k, v in tensors_of(model).items())

    class Break(Rule):
        def after_backward(self, run: Any) -> None:
            next(iter(run.parameters.values())).grad[0, 0] = float("nan")

    with pytest.raises(DivergedError, match="step 1: the gradient that the rules made is not finite"):
        fit(model, points(), steps=4, rules=[Break()])


def test_patience_ends_the_run() -> None:
    losses = iter([9.0, 5.0, 4.0, 4.0, 4.5, 1.0])
    result = fit(
        mlp(), points(), evaluate=lambda m: next(losses), settings=settings(steps=50, eval_every=2, patience=2)
    )
    assert (result.steps, result.stopped, len(result.losses)) == (8, "patience", 8)
    assert (result.best.step, result.best.loss, result.best.folder) == (4, 4.0, None)
    assert result.metrics == {"before": {"loss": 9.0}, "after": {"loss": 4.5}}


# Evaluation.


def test_evaluation_leaves_no_trace() -> None:
    plan = Plan(rl.LoRA(r=3, lora_dropout=0.3), target_modules=("o_proj",))
    modes: list[tuple[bool, bool]] = []

    def judge(model: nn.Module) -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        torch.rand(5)
        return {"loss": 1.0, "accuracy": 0.5}

    one = fit(attached(llama, {"default": plan}, 1), texts(), settings=settings())
    two = fit(attached(llama, {"default": plan}, 1), texts(), settings=settings(eval_every=2), evaluate=judge)
    assert one.losses == two.losses
    assert set(modes) == {(False, False)}
    assert two.metrics["after"] == {"loss": 1.0, "accuracy": 0.5}


def test_mean_loss_over_batches_weighs_by_labels() -> None:
    model = attached(llama, {"default": LORA}, 1)
    held = texts(3)
    result = fit(model, texts(), settings=settings(steps=1), evaluate=held)
    ids, labels = (torch.cat([b[k] for b in held]) for k in ("input_ids", "labels"))
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, labels=labels).loss.item()
    assert result.metrics["after"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluations_that_cannot_be_are_refused() -> None:
    with pytest.raises(SettingsError, match="eval_every needs something to evaluate"):
        fit(mlp(), points(), settings=settings(eval_every=2))
    with pytest.raises(SettingsError, match="patience counts evaluations: give eval_every"):
        fit(mlp(), points(), settings=settings(patience=2), evaluate=points())
    with pytest.raises(SettingsError, match="need 'loss'"):
        fit(mlp(), points(), settings=settings(patience=2, eval_every=1), evaluate=lambda m: {"accuracy": 1.0})
    with pytest.raises(SettingsError, match="evaluate returned a str"):
        fit(mlp(), points(), settings=settings(), evaluate=lambda m: "good")  # type: ignore[arg-type,return-value]
    with pytest.raises(DataError, match="evaluate gave no batch"):
        fit(mlp(), points(), settings=settings(), evaluate=iter(points(1)))
    with pytest.raises(SettingsError, match="end_with='best' needs checkpoints: give out=folder"):
        fit(mlp(), points(), settings=settings(end_with="best"), evaluate=points())
    with pytest.raises(SettingsError, match="save_every=2 needs checkpoints"):
        fit(mlp(), points(), settings=settings(save_every=2))
    assert fit(mlp(), points(), settings=settings(), evaluate=lambda m: {"f1": 0.5}).best is None


# Settings.


def test_settings_are_said_once() -> None:
    assert fit(mlp(), points(), settings=TrainSettings(steps=3)).steps == 3
    with pytest.raises(SettingsError, match=r"steps=5 and settings.steps=3: say it once"):
        fit(mlp(), points(), 5, settings=TrainSettings(steps=3))
    with pytest.raises(SettingsError, match=r"lr=0.1 and settings.lr=0.001"):
        fit(mlp(), points(), lr=0.1, settings=TrainSettings())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps": 0}, "steps=0: expected a whole number from 1"), ({"lr": -1.0}, "lr=-1.0: expected a number above 0"),
        ({"lr": float("nan")}, "lr=nan"), ({"clip": 0.0}, "clip=0.0: expected a number above 0 or null"),
        ({"betas": (0.9, 1.0)}, "from 0 to below 1"), ({"warmup_steps": 3, "warmup_ratio": 0.1}, "give one of them"),
        ({"steps": 3, "warmup_steps": 3}, "does not fit into steps=3"), ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"precision": "bf32"}, "did you mean 'bf16'"), ({"report_to": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"end_with": "first"}, "one of 'last', 'best'"), ({"keep": 0}, "keep=0"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        TrainSettings(**wrong)


def test_seeds_decide(tmp_path: Any) -> None:
    plan = Plan(rl.LoRA(r=3, lora_dropout=0.3), target_modules=("o_proj",))

    def losses(seed: int | None) -> list[float]:
        torch.manual_seed(seed or 17)
        return fit(attached(llama, {"default": plan}, 1), texts(), settings=settings(seed=seed)).losses

    assert losses(3) == losses(3) != losses(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses(None)


# Loss scaling. The scaler itself runs on the CPU too; only autocast to float16 needs a GPU.


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Any:
    from contextlib import contextmanager

    from rankloom.train import fit as module

    real, scales = module.accelerator, []

    @contextmanager
    def with_scaler(device: torch.device, chosen: TrainSettings) -> Any:
        with real(device, chosen) as engine:
            engine.scaler = torch.amp.GradScaler("cpu", init_scale=scales[0], growth_interval=3)
            yield engine

    monkeypatch.setattr(module, "accelerator", with_scaler)
    return scales


def test_overflows_are_skipped_and_counted(scaled: list[float], tmp_path: Any) -> None:
    from rankloom.train.report import read_metrics

    plan = Plan(rl.AdaLoRA(init_r=3, target_r=2))
    one, two = attached(mlp, {"default": plan}, 1), attached(mlp, {"default": plan}, 1)
    scaled.append(2.0**10)
    loss = lambda m, b: 4096 * (m(b[0]) - b[1]).pow(2).mean()  # noqa: E731
    plain = fit(one, points(1), settings=settings(steps=6), loss=loss)
    scaled[0] = 2.0**127
    result = fit(two, points(1), settings=settings(steps=6), loss=loss, out=tmp_path)
    skips = [r for r in read_metrics(tmp_path) if r["event"] == "skip"]
    assert plain.skipped == 0
    assert result.skipped == len(skips) > 1
    assert (result.steps, len(result.losses)) == (6, 6)
    assert result.losses == plain.losses, "a power of two changes nothing, and a skipped step leaves no trace in a rule"
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(one).values(), tensors_of(two).values(), strict=True))


def test_the_scale_resumes(scaled: list[float], tmp_path: Any) -> None:
    from train_world import breaking_at

    scaled.append(2.0**4)
    plan = {"default": Plan(rl.LoRA(r=2))}
    straight = fit(attached(mlp, plan, 1), points(), settings=settings(), out=tmp_path / "a")
    with pytest.raises(Interrupted):
        fit(
            attached(mlp, plan, 1), points(), settings=settings(save_every=5), out=tmp_path / "b", report=breaking_at(5)
        )
    assert (
        fit(attached(mlp, plan, 1), points(), settings=settings(), out=tmp_path / "b", resume=True).losses
        == straight.losses
    )
    states = [(tmp_path / n / "checkpoints" / "step-00000012" / "state.json").read_text() for n in "ab"]
    assert all('"scale": 256.0' in state for state in states)


def test_endless_overflow_ends(scaled: list[float]) -> None:
    class Trap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g * float("inf")

    scaled.append(2.0**20)
    with pytest.raises(DivergedError, match="step 1: the gradients overflowed 50 times in a row"):
        fit(mlp(), points(), settings=settings(), loss=lambda m, b: Trap.apply(m(b[0])).mean())
