"""Rules inside transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import rankloom as rl
import rankloom.hf.trainer as bridge
from rankloom.core.rule import Rule
from rankloom.errors import FileError, MissingExtra, SettingsError, StateError, UnreachedError
from rankloom.hf.trainer import RankloomCallback, optimizer_for
from rankloom.methods.adalora import AdaLoRA, AdaLoRAAdapter
from rankloom.presets import lora_fa
from rankloom.train.fit import fit
from rankloom.train.settings import TrainSettings

TARGETS = ["q_proj", "v_proj"]


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def _examples(n: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 32, (n, 6), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]


class _InOrder(Trainer):
    """No shuffling, so that batches can be named."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, self.args.per_device_train_batch_size, collate_fn=self.data_collator)
        )


def _args(tmp_path, steps: int = 10, **settings) -> TrainingArguments:
    defaults = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return TrainingArguments(str(tmp_path), **{**defaults, **settings})


class _Watch(TrainerCallback):
    """What a test wants to know of every step."""

    def __init__(self, look) -> None:
        self.look, self.seen = look, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.look(**kwargs))


def _living(model: nn.Module) -> int:
    return sum(int((a.E != 0).sum()) for _, a in model.rankloom.adapters(of=AdaLoRAAdapter))


def _base(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if ".adapters." not in k}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def _vectors(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for _, p, _ in model.rankloom.tensors("default")]


def test_adalora_budget_moves(tmp_path):
    """The number of living triplets falls along the schedule to its target; the base stays bitwise."""
    model = _llama()
    rl.attach(model, AdaLoRA(init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2), target_modules=TARGETS)
    before, watch = _base(model), _Watch(lambda model, **_: _living(model))
    optimizer = optimizer_for(model, lr=1e-2)
    trainer = Trainer(
        model,
        _args(tmp_path, 10),
        train_dataset=_examples(8),
        optimizers=(optimizer, None),
        callbacks=[RankloomCallback(), watch],
    )
    trainer.train()
    # budget at t = 4, 6, 7 of 16 → 8 with t_init 2 and 3 steps left: int(8 + 8 (1 − (t−2)/5)³)
    assert watch.seen == [16, 16, 16, 9, 16, 8, 8, 8, 8, 8]
    assert _same(_base(model), before)


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnop"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def test_adalora_budget_moves_in_sft_trainer(tmp_path):
    """The same under TRL, from texts, with LoRA+ on top."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = _llama()
    rl.attach(model, AdaLoRA(init_r=3, target_r=1, tfinal=2), target_modules=TARGETS)
    before, watch = _base(model), _Watch(lambda model, **_: _living(model))
    optimizer = optimizer_for(model, lr=1e-2, rules=[rl.LoRAPlus(ratio=4.0)])
    settings = _args(tmp_path, 6).to_dict()
    keep = ("output_dir", "max_steps", "per_device_train_batch_size", "use_cpu", "save_strategy", "disable_tqdm")
    args = SFTConfig(**{k: settings[k] for k in keep}, report_to="none", bf16=False, gradient_checkpointing=False)
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([{"text": "a b c d e f"}, {"text": "g h i j"}] * 6),
        processing_class=_tokenizer(),
        optimizers=(optimizer, None),
        callbacks=[RankloomCallback(), watch],
    )
    trainer.train()
    assert watch.seen[-3:] == [4, 4, 4]
    assert watch.seen[0] > 4
    assert _same(_base(model), before)
    assert sorted(g["initial_lr"] for g in optimizer.param_groups) == [1e-2, 4e-2]


def test_loraplus_rates_are_kept_under_the_scheduler(tmp_path):
    """Group rates are there from the first step and keep their ratio to the end of the schedule."""
    model = _llama()
    rl.attach(model, rl.LoRA(r=2), target_modules=TARGETS, rules=[rl.LoRAPlus(ratio=8.0)])
    optimizer = optimizer_for(model, lr=1e-3)
    rates = _Watch(lambda optimizer, **_: sorted(g["lr"] for g in optimizer.param_groups))
    trainer = Trainer(
        model,
        _args(tmp_path, 8, lr_scheduler_type="linear", warmup_steps=2),
        train_dataset=_examples(8),
        optimizers=(optimizer, None),
        callbacks=[RankloomCallback(), rates],
    )
    trainer.train()
    assert max(r[0] for r in rates.seen) == pytest.approx(1e-3)
    for low, high in rates.seen[:-1]:
        assert high / low == pytest.approx(8.0)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_agrees_with_fit(tmp_path, make):
    """Plain LoRA on the same batches: losses of every step and final tensors agree with `rankloom.fit`."""
    base, rows = _llama(), _examples(12)
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    for m in (model, other):
        torch.manual_seed(2)
        rl.attach(m, rl.LoRA(r=2), target_modules=TARGETS)
    batches = [{k: torch.stack([r[k] for r in rows[i : i + 2]]) for k in rows[0]} for i in range(0, 12, 2)]
    args = _args(tmp_path, 6, lr_scheduler_type="constant", max_grad_norm=0.5)
    trainer = _InOrder(
        model,
        args,
        train_dataset=rows,
        optimizers=(optimizer_for(model, lr=1e-2, make=make), None),
        callbacks=[RankloomCallback()],
    )
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    if make is torch.optim.AdamW:
        ours = fit(other, batches, settings=TrainSettings(steps=6, lr=1e-2, schedule="constant", clip=0.5)).losses
    else:
        ours = _by_hand(other, batches)
    assert theirs == pytest.approx(ours, abs=2e-4)
    assert theirs[-1] != pytest.approx(theirs[0], abs=1e-3)
    for a, b in zip(_vectors(model), _vectors(other)):
        assert torch.allclose(a, b, atol=1e-6)


def _by_hand(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    model.train()
    parameters = [p for _, p, _ in model.rankloom.trainable()]
    optimizer, losses = torch.optim.SGD(parameters, lr=1e-2), []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_adalora_agrees_with_fit(tmp_path):
    """AdaLoRA with its penalty and budget: the same tensors as `rankloom.fit` where nothing is clipped."""
    base, rows = _llama(), _examples(12)
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    for m in (model, other):
        torch.manual_seed(2)
        rl.attach(m, AdaLoRA(init_r=3, target_r=2, tfinal=2), target_modules=TARGETS)
    batches = [{k: torch.stack([r[k] for r in rows[i : i + 2]]) for k in rows[0]} for i in range(0, 12, 2)]
    _InOrder(
        model,
        _args(tmp_path, 6, lr_scheduler_type="constant", max_grad_norm=0.0),
        train_dataset=rows,
        optimizers=(optimizer_for(model, lr=1e-2), None),
        callbacks=[RankloomCallback()],
    ).train()
    fit(other, batches, settings=TrainSettings(steps=6, lr=1e-2, schedule="constant", clip=None))
    assert _living(model) == _living(other) == 8
    for a, b in zip(_vectors(model), _vectors(other)):
        assert torch.allclose(a, b, atol=1e-5)


class _Log(Rule):
    """Writes down what is called, at which step, and with which gradients."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.steps: list[int] = []

    def start(self, run):
        self.calls.append("start")

    def before_step(self, run):
        self.calls.append("before_step")
        self.steps.append(run.step)

    def loss(self, run, loss):
        self.calls.append("loss")
        return loss + 3.0 * sum((p * 1.0).sum() for _, p, _ in run.bank.trainable())

    def after_backward(self, run):
        self.calls.append("after_backward")
        self.gradients = [p.grad.clone() for _, p, _ in run.bank.trainable()]

    def after_step(self, run):
        self.calls.append("after_step")
        assert all(p.grad is not None for _, p, _ in run.bank.trainable())

    def finish(self, run):
        self.calls.append("finish")


def test_order_and_penalty(tmp_path):
    """Hooks come in the documented order, `loss` once for each batch of a step; the penalty's gradient is exact."""
    model, rule = _llama(), _Log()
    rl.attach(model, rl.LoRA(r=2), target_modules=TARGETS)
    args = _args(tmp_path, 2, gradient_accumulation_steps=2, max_grad_norm=0.0, lr_scheduler_type="constant")
    rows = _examples(8)
    start = copy.deepcopy(model)
    optimizer = optimizer_for(model, lr=0.0, rules=[rule], make=torch.optim.SGD)
    _InOrder(model, args, train_dataset=rows, optimizers=(optimizer, None), callbacks=[RankloomCallback()]).train()
    step = ["before_step", "loss", "after_backward", "after_step"]
    assert [c for i, c in enumerate(rule.calls) if c != "loss" or rule.calls[i - 1] != "loss"] == [
        "start",
        *step,
        *step,
        "finish",
    ]
    assert rule.steps == [0, 1]
    batch = {k: torch.stack([r[k] for r in rows[4:]]) for k in rows[0]}
    start.train()(**batch).loss.backward()
    for (_, p, _), g in zip(start.rankloom.trainable(), rule.gradients):
        assert torch.allclose(g, p.grad + 3.0, atol=1e-5)


def test_what_rules_change_is_clipped_again(tmp_path):
    """With max_grad_norm the gradient that reaches the optimizer is within it, penalties included."""
    model, norms = _llama(), []
    rl.attach(model, rl.LoRA(r=2), target_modules=TARGETS)
    optimizer = optimizer_for(model, rules=[_Log()])
    optimizer.register_step_pre_hook(
        lambda o, *_: norms.append(
            float(nn.utils.get_total_norm([p.grad for g in o.param_groups for p in g["params"]]))
        )
    )
    Trainer(
        model,
        _args(tmp_path, 2, max_grad_norm=0.25),
        train_dataset=_examples(4),
        optimizers=(optimizer, None),
        callbacks=[RankloomCallback()],
    ).train()
    assert norms == pytest.approx([0.25, 0.25], rel=1e-4)


def _run(folder, model, steps: int, resume=None, stop_at: int | None = None, callback=None):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop_at:
                control.should_training_stop = True

    args = _args(folder, steps, save_strategy="steps", save_steps=4, lr_scheduler_type="linear")
    callbacks = [callback or RankloomCallback(), Stop()]
    trainer = _InOrder(
        model, args, train_dataset=_examples(16), optimizers=(optimizer_for(model, lr=1e-2), None), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)


def _adapted() -> LlamaForCausalLM:
    model = _llama()
    torch.manual_seed(3)
    rl.attach(model, AdaLoRA(init_r=3, target_r=1, tfinal=2, deltaT=3), target_modules=TARGETS)
    return model


def test_resume_is_exact(tmp_path):
    """Checkpoints hold the rules' memory without pickle; stopped at step 4 and resumed, the tensors end bit for bit the same."""
    straight = _adapted()
    _run(tmp_path / "a", straight, 8)
    stopped = _adapted()
    _run(tmp_path / "b", stopped, 8, stop_at=4)
    folder = tmp_path / "b" / "checkpoint-4" / "rankloom"
    files = {"groups.json", "manifest.json", "rules.json", "rules.safetensors"}
    assert {p.name for p in (folder / "rules").iterdir()} == files
    assert [r["rule"] for r in json.loads((folder / "rules" / "rules.json").read_text())] == ["Budget", "Orthogonal"]
    resumed = _adapted()
    _run(tmp_path / "b", resumed, 8, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(_vectors(straight), _vectors(resumed)))
    assert not all(torch.equal(a, b) for a, b in zip(_vectors(stopped), _vectors(resumed)))
    (tmp_path / "b" / "checkpoint-4").rename(tmp_path / "moved")
    with pytest.raises(FileError, match="resume_from"):
        _run(tmp_path / "c", _adapted(), 8, resume=str(tmp_path / "moved"))
    again = _adapted()
    _run(tmp_path / "d", again, 8, str(tmp_path / "moved"), callback=RankloomCallback(resume_from=tmp_path / "moved"))
    assert all(torch.equal(a, b) for a, b in zip(_vectors(straight), _vectors(again)))


def test_resume_is_exact_without_rules(tmp_path):
    """Plain LoRA: what layers learnt of groups is in the checkpoint, so sums round alike after a resume."""

    def plain():
        model = _llama()
        torch.manual_seed(3)
        rl.attach(model, rl.LoRA(r=2), target_modules=TARGETS)
        return model

    straight, stopped, resumed = plain(), plain(), plain()
    _run(tmp_path / "a", straight, 6)
    _run(tmp_path / "b", stopped, 6, stop_at=4)
    _run(tmp_path / "b", resumed, 6, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(_vectors(straight), _vectors(resumed)))


def test_checkpoint_holds_the_adapter(tmp_path):
    """The adapter lies in the checkpoint as an adapter folder, and loads into a fresh base."""
    model = _adapted()
    _run(tmp_path, model, 4)
    fresh = _llama()
    rl.load(fresh, tmp_path / "checkpoint-4" / "rankloom" / "adapters" / "default")
    ids = torch.arange(6)[None]
    assert torch.allclose(fresh.eval()(ids).logits, model.eval()(ids).logits, atol=1e-6)


def test_rules_without_a_driver_are_refused(tmp_path):
    """Not silent: an optimizer whose rules nobody drives does not step; rules that only shape groups need no callback."""
    model = _adapted()
    trainer = Trainer(model, _args(tmp_path), train_dataset=_examples(4), optimizers=(optimizer_for(model), None))
    with pytest.raises(StateError, match=r"Budget, Orthogonal.*RankloomCallback"):
        trainer.train()
    plain = _llama()
    rl.attach(plain, rl.LoRA(r=2), target_modules=TARGETS)
    optimizer = optimizer_for(plain, rules=[rl.LoRAPlus()])
    Trainer(plain, _args(tmp_path, 2), train_dataset=_examples(4), optimizers=(optimizer, None)).train()


def test_groups_need_the_factory(tmp_path):
    """Not silent: LoRA+ with the Trainer's own optimizer is refused, naming the factory."""
    model = _llama()
    rl.attach(model, rl.LoRA(r=2), target_modules=TARGETS)
    trainer = Trainer(
        model, _args(tmp_path), train_dataset=_examples(4), callbacks=[RankloomCallback([rl.LoRAPlus(ratio=2.0)])]
    )
    with pytest.raises(SettingsError, match="optimizer_for"):
        trainer.train()


def test_the_trainers_own_optimizer_will_do(tmp_path):
    """Rules that leave the groups alone work with whatever optimizer the Trainer makes."""
    model = _adapted()
    Trainer(model, _args(tmp_path, 6), train_dataset=_examples(4), callbacks=[RankloomCallback()]).train()
    assert _living(model) == 4


def test_lora_fa_keeps_a(tmp_path):
    """A plan's rules are found: LoRA-FA's A stays bitwise, and the projection is in the step."""
    model = _llama()
    rl.attach(model, lora_fa(r=2, lora_alpha=32), target_modules=TARGETS)
    start = copy.deepcopy(model)
    optimizer = optimizer_for(model, lr=0.1, make=torch.optim.SGD)
    rows = _examples(2)
    _InOrder(
        model,
        _args(tmp_path, 1, max_grad_norm=0.0, lr_scheduler_type="constant"),
        train_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[RankloomCallback()],
    ).train()
    start.train()(**{k: torch.stack([r[k] for r in rows]) for k in rows[0]}).loss.backward()
    for (_, new), (_, old) in zip(model.rankloom.adapters(), start.rankloom.adapters()):
        assert torch.equal(new.A, old.A)
        want = -0.1 * old.B.grad @ torch.linalg.inv(old.A @ old.A.T) / 16**2
        assert torch.allclose(new.B, want, rtol=1e-3, atol=1e-6)


def test_deaf_tensors_stop_the_run(tmp_path):
    """A trainable tensor without gradient in any of the first steps stops the run."""
    model = _llama()
    model.unused = nn.Linear(3, 3)
    rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj", "unused"])
    with pytest.raises(UnreachedError, match="unused"):
        Trainer(model, _args(tmp_path), train_dataset=_examples(4), callbacks=[RankloomCallback()]).train()


class _Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x, labels):
        y = self.fc(self.norm(x))
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


def test_statistics_of_the_base_stay(tmp_path):
    """Running statistics belong to the frozen base: bitwise the same after training, also for a plain nn.Module."""
    torch.manual_seed(0)
    model = _Normed()
    rl.attach(model, rl.LoRA(r=1), target_modules=["fc"])
    before = _base(model)
    rows = [{"x": torch.randn(4) + 3, "labels": torch.tensor(i % 2)} for i in range(8)]
    args = _args(tmp_path, 3, per_device_train_batch_size=4, remove_unused_columns=False)
    Trainer(model, args, train_dataset=rows, callbacks=[RankloomCallback()]).train()
    assert _same(_base(model), before)
    assert not model.norm._forward_pre_hooks


def test_no_adapters(tmp_path):
    """A bare model is refused by name, in both."""
    model = _llama()
    with pytest.raises(StateError, match="attach"):
        optimizer_for(model)
    with pytest.raises(StateError, match="attach"):
        Trainer(model, _args(tmp_path), train_dataset=_examples(4), callbacks=[RankloomCallback()]).train()


def test_without_transformers(monkeypatch):
    """The callback's base is looked up at first use; without transformers the error names the extra."""
    bridge._callback.cache_clear()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"rankloom\[hf\]"):
        bridge.RankloomCallback
    monkeypatch.undo()
    assert issubclass(bridge.RankloomCallback, TrainerCallback)
    with pytest.raises(AttributeError):
        bridge.RankloomCallbacks
