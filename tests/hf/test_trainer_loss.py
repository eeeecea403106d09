"""A rule's `loss` inside the Trainer and the SFTTrainer: on activations, accumulated, logged; the rate; the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_trainer import _args, _examples, _InOrder, _llama, _tokenizer, _Watch
from transformers import Trainer

import rankloom as rl
from rankloom.core.rule import Rule
from rankloom.core.thin import Thin
from rankloom.errors import SettingsError, StateError
from rankloom.hf.trainer import RankloomCallback, optimizer_for
from rankloom.methods.lora import LoRAAdapter
from rankloom.train.fit import fit
from rankloom.train.settings import TrainSettings

TARGETS = ["q_proj", "v_proj"]


class NotingAdapter(LoRAAdapter):
    """LoRA that notes a router's shares and the context."""

    def thin(self, base, x) -> Thin:
        if x is not None:
            base.note("router", (x @ self.A.mT).softmax(-1))
            for name, value in base.context.items():
                base.note(f"context/{name}", value)
        return super().thin(base, x)


@dataclass(frozen=True)
class Noting(rl.LoRA):
    def build(self, site):
        return NotingAdapter(site, self)


@dataclass
class Balance(Rule):
    """loss + weight · Σ r Σ_k (mean share)²."""

    weight: float = 0.5
    reads = ("router",)

    def loss(self, run, loss):
        each = [p.shape[-1] * p.flatten(0, -2).mean(0).square().sum() for p in run.notes["router"].values()]
        assert len(each) == 4
        self.penalty = self.weight * torch.stack(each).sum()
        return loss + self.penalty


class Gradients(Rule):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.each: list[Any] = []

    def after_backward(self, run):
        self.each.append({key: p.grad.clone() for key, p in run.parameters.items()})


def noting():
    model = _llama()
    torch.manual_seed(2)
    rl.attach(model, Noting(r=2), target_modules=TARGETS)
    return model


def batches(rows: list[Any], size: int = 2) -> list[dict[str, torch.Tensor]]:
    return [{k: torch.stack([r[k] for r in rows[i : i + size]]) for k in rows[0]} for i in range(0, len(rows), size)]


def ragged(n: int) -> list[dict[str, torch.Tensor]]:
    """Rows with labels in different numbers."""
    rows = _examples(n)
    for i, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][: 1 + i % 4] = -100
    return rows


def trained(model, tmp_path, rows, rules, kind=_InOrder, steps=1, callback=None, **settings):
    args = _args(tmp_path, steps, max_grad_norm=0.0, lr_scheduler_type="constant", **settings)
    trainer = kind(
        model, args, train_dataset=rows, optimizers=(optimizer_for(model, lr=1e-2, rules=rules), None),
        callbacks=[callback or RankloomCallback()],
    )  # fmt: skip
    trainer.train()
    return trainer


def test_one_step_is_bit_for_bit_that_of_fit(tmp_path):
    """Gradients of loss + balance penalty on activations: the same bits as from `rankloom.fit` on the same batch."""
    rows, mine, theirs = ragged(2), Gradients(), Gradients()
    trained(noting(), tmp_path, rows, [Balance(), theirs])
    fit(noting(), batches(rows), rules=[Balance(), mine], settings=TrainSettings(steps=1, lr=1e-2, clip=None))
    assert mine.each[0].keys() == theirs.each[0].keys()
    assert all(torch.equal(g, theirs.each[0][key]) for key, g in mine.each[0].items())
    without = Gradients()
    trained(noting(), tmp_path, rows, [without])
    assert not all(torch.allclose(g, without.each[0][key], atol=1e-6) for key, g in mine.each[0].items())


def test_accumulated_batches_count_by_their_labels(tmp_path):
    """Under accumulation the penalty of each batch weighs as its loss does, as in `rankloom.fit`; the log holds both."""
    rows, mine, theirs = ragged(8), Gradients(), Gradients()
    trainer = trained(noting(), tmp_path, rows, [Balance(), theirs], gradient_accumulation_steps=4)
    told: list[Any] = []
    settings = TrainSettings(steps=1, lr=1e-2, clip=None, accumulate=4)
    fit(noting(), batches(rows), rules=[Balance(), mine], settings=settings, report=told.append)
    for key, g in mine.each[0].items():
        assert torch.allclose(g, theirs.each[0][key], atol=1e-6)
    ours = next(row for row in told if row["event"] == "train")
    logged = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert ours["penalty"] > 0.1
    assert logged == pytest.approx(ours["loss"] + ours["penalty"], abs=2e-4)


def test_checkpointing_keeps_the_penalty(tmp_path):
    """The Trainer's own gradient checkpointing: the same gradients."""
    rows, plain, again = ragged(2), Gradients(), Gradients()
    trained(noting(), tmp_path, rows, [Balance(), plain])
    more = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trained(noting(), tmp_path, rows, [Balance(), again], **more)
    assert all(torch.allclose(g, again.each[0][key], atol=1e-6) for key, g in plain.each[0].items())


class Doubles(Rule):
    def loss(self, run, loss):
        assert run.output.logits.shape[:2] == run.batch["input_ids"].shape
        return 2 * loss


def test_a_rule_may_scale_the_loss(tmp_path):
    """Not only adding: twice the loss, twice the gradient, twice in the log."""
    rows, once, twice = ragged(4), Gradients(), Gradients()
    one = trained(noting(), tmp_path, rows, [once], gradient_accumulation_steps=2)
    two = trained(noting(), tmp_path, rows, [Doubles(), twice], gradient_accumulation_steps=2)
    assert all(torch.allclose(2 * g, twice.each[0][key], atol=1e-6) for key, g in once.each[0].items())
    losses = [t.state.log_history[0]["loss"] for t in (one, two)]
    assert losses[1] == pytest.approx(2 * losses[0], abs=2e-3)


def test_evaluation_is_left_alone(tmp_path):
    """Eval passes see neither the penalty nor notes; after training nothing hangs on the model."""
    model, rows = noting(), ragged(4)
    args = _args(tmp_path, 2, eval_strategy="steps", eval_steps=1)
    trainer = Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, callbacks=[RankloomCallback([Balance(weight=100.0)])]
    )
    trainer.train()
    evals = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evals) == 2
    assert max(evals) < 20
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert model.rankloom.selector.notes is None


@pytest.mark.parametrize("how", ["smoothing", "function"])
def test_a_loss_made_outside_the_model_is_refused(tmp_path, how):
    """Not silent: label smoothing and compute_loss_func make the loss where no hook sees it."""
    model, more = noting(), {}
    args = _args(tmp_path, 1, label_smoothing_factor=0.1 if how == "smoothing" else 0.0)
    if how == "function":
        more["compute_loss_func"] = lambda out, labels, num_items_in_batch: out.logits.square().mean()
    trainer = Trainer(model, args, train_dataset=ragged(2), callbacks=[RankloomCallback([Balance()])], **more)
    with pytest.raises(SettingsError, match=r"Balance.*outside the model"):
        trainer.train()


def test_a_loss_that_the_trainer_does_not_use_is_refused(tmp_path):
    """Not silent: a Trainer that reads the model's loss and trains on another."""

    class Other(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **more):
            return model(**inputs).logits.square().mean()

    with pytest.raises(StateError, match=r"Balance.*not the one that the model returned"):
        Other(noting(), _args(tmp_path, 1), train_dataset=ragged(2), callbacks=[RankloomCallback([Balance()])]).train()


def _sft(model, tmp_path, rules, rows, steps=1, **settings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    usual = {
        "max_steps": steps, "per_device_train_batch_size": 2, "use_cpu": True, "save_strategy": "no", "bf16": False,
        "disable_tqdm": True, "report_to": "none", "gradient_checkpointing": False, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "packing": False, "shuffle_dataset": False,
    }  # fmt: skip
    from torch.utils.data import SequentialSampler

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset or self.train_dataset)

    trainer = InOrder(
        model, SFTConfig(str(tmp_path), **{**usual, **settings}), train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(), optimizers=(optimizer_for(model, lr=1e-2, rules=rules), None),
        callbacks=[RankloomCallback()],
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_penalty_on_activations_in_sft_trainer(tmp_path, accumulate):
    """TRL's SFTTrainer, which makes its loss of token log-probabilities: gradients and logged loss are those of `fit`."""
    ids = [[4, 5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16], [5, 7, 9, 11, 13]]
    rows = [{"input_ids": row} for row in ids[: 2 * accumulate]]
    mine, theirs, told = Gradients(), Gradients(), []
    trainer = _sft(noting(), tmp_path, [Balance(), theirs], rows, gradient_accumulation_steps=accumulate)
    padded = []
    for first, second in zip(ids[::2], ids[1::2]):
        width = max(len(first), len(second))
        pad = [row + [0] * (width - len(row)) for row in (first, second)]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in (first, second)]
        label = [row + [-100] * (width - len(row)) for row in (first, second)]
        padded.append(
            {"input_ids": torch.tensor(pad), "attention_mask": torch.tensor(mask), "labels": torch.tensor(label)}
        )
    settings = TrainSettings(steps=1, lr=1e-2, clip=None, accumulate=accumulate)
    fit(noting(), padded[:accumulate], rules=[Balance(), mine], settings=settings, report=told.append)
    for key, g in mine.each[0].items():
        assert torch.allclose(g, theirs.each[0][key], atol=1e-5), key
    ours = next(row for row in told if row["event"] == "train")
    assert trainer.state.log_history[0]["loss"] == pytest.approx(ours["loss"] + ours["penalty"], abs=1e-3)


def test_a_loss_type_of_its_own_is_refused_in_sft_trainer(tmp_path):
    """Not silent: DFT weighs tokens by their own probability, which a change of the log-probabilities would spoil."""
    with pytest.raises(SettingsError, match="loss_type"):
        _sft(noting(), tmp_path, [Balance()], [{"input_ids": [4, 5, 6]}] * 2, loss_type="dft")


class Jagged(Rule):
    def rate(self, run):
        return 0.5 if run.step % 2 else 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "reduce_lr_on_plateau"])
def test_rate_under_any_scheduler(tmp_path, kind):
    """The step is taken, and logged, at schedule · rate; the scheduler's own course is not disturbed."""
    taken: dict[bool, list[float]] = {}
    for jagged in (False, True):
        rates: list[float] = []
        model = noting()
        optimizer = optimizer_for(model, lr=1e-2, rules=[rl.LoRAPlus(ratio=4.0), *([Jagged()] if jagged else [])])
        optimizer.register_step_pre_hook(lambda o, *_, rates=rates: rates.extend(g["lr"] for g in o.param_groups))
        more = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_loss"}
        args = _args(tmp_path, 5, lr_scheduler_type=kind, **more)
        ends = _Watch(lambda optimizer, **_: [g["lr"] for g in optimizer.param_groups])
        trainer = Trainer(
            model, args, train_dataset=ragged(4), eval_dataset=ragged(2), optimizers=(optimizer, None),
            callbacks=[RankloomCallback(), ends],
        )  # fmt: skip
        trainer.train()
        taken[jagged] = rates
        logged = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
        assert logged == pytest.approx(rates[::2])
    want = [rate * (0.5 if (i // 2) % 2 else 1.0) for i, rate in enumerate(taken[False])]
    assert taken[True] == pytest.approx(want)


class Reads(Rule):
    reads = ("context/task", "context/attention_mask", "router")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def loss(self, run, loss):
        self.seen.append({kind: dict(run.notes[kind]) for kind in self.reads})
        run.forward(run.batch)
        return loss


def test_columns_reach_gates(tmp_path):
    """`context`: columns of the batch come to adapters through the selection, and not to a model that lacks them."""
    model, rule, rows = noting(), Reads(), ragged(4)
    for i, row in enumerate(rows):
        row["task"] = torch.tensor(i)
    callback = RankloomCallback([rule], context=("task", "attention_mask"))
    trained(model, tmp_path, rows, [], callback=callback, steps=2, remove_unused_columns=False)
    tasks = [next(iter(seen["context/task"].values())).tolist() for seen in rule.seen]
    assert tasks == [[0, 1], [2, 3]]
    assert next(iter(rule.seen[0]["context/attention_mask"].values())).shape == (2, 6)
    assert not model._forward_hooks


def test_a_column_that_is_not_there_is_refused(tmp_path):
    """Not silent: the columns there are, and what makes a Trainer drop one."""
    with pytest.raises(SettingsError, match=r"'task'.*'input_ids'.*remove_unused_columns=False"):
        trained(noting(), tmp_path, ragged(2), [], callback=RankloomCallback(context=("task",)))


def test_a_training_that_broke_off_leaves_nothing_behind(tmp_path):
    """A second training with the same callback starts clean."""

    class Breaks(Rule):
        def after_backward(self, run):
            raise RuntimeError("broken")

    model = noting()
    callback = RankloomCallback([Balance(), breaks := Breaks()])
    trainer = Trainer(model, _args(tmp_path, 1), train_dataset=ragged(2), callbacks=[callback])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    breaks.after_backward = lambda run: None
    trainer.train()
    assert not model._forward_hooks
