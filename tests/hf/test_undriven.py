"""A training that does not call the rules of its adapters is told so, once; any other is left in peace."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import rankloom as rl
import tiny
from rankloom.hf.trainer import RankloomCallback, optimizer_for
from rankloom.train.fit import fit

WORDS = "trained without its rules Budget, Orthogonal: nobody calls them"


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def adalora(model):
    rl.attach(model, rl.AdaLoRA(init_r=4, target_r=2), target_modules=["0", "2"])
    return model


def train(model, steps=5):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_loop_that_knows_no_rules_is_told_once():
    with pytest.warns(UserWarning, match=WORDS) as told:
        train(adalora(small()))
    assert len(told) == 1


@pytest.mark.parametrize("what", ["one backward", "several backwards", "lora", "lora plus", "fit"])
def test_others_are_left_in_peace(what):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small()
        if what == "lora":
            rl.attach(model, rl.LoRA(r=2), target_modules=["0", "2"])
            train(model)
        elif what == "lora plus":
            rl.attach(model, rl.LoRA(r=2), target_modules=["0", "2"], rules=(rl.LoRAPlus(),))
            train(model)
        elif what == "fit":
            fit(adalora(model), [(torch.randn(5, 6), torch.randn(5, 3))], steps=4)
            assert not model.rankloom.driven
        else:
            adalora(model)
            for _ in range(1 if what == "one backward" else 3):
                model(torch.randn(5, 6)).square().mean().backward()


def test_copies_and_pickles_of_a_watched_model_work():
    for twin in (copy.deepcopy(adalora(small())), pickle.loads(pickle.dumps(adalora(small())))):
        assert twin.rankloom.model is twin
        assert torch.isfinite(twin(torch.randn(5, 6))).all()


@pytest.mark.parametrize("driven", [False, True])
def test_a_trainer_with_neither_optimizer_nor_callback_is_told(driven, tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    rl.attach(model, rl.AdaLoRA(init_r=4, target_r=2), target_modules=["q_proj", "v_proj"])
    ids = torch.randint(32, (6, 5))
    args = TrainingArguments(str(tmp_path), max_steps=5, per_device_train_batch_size=2, report_to=[], use_cpu=True)
    data = [{"input_ids": row, "labels": row} for row in ids]
    ours = {"optimizers": (optimizer_for(model, lr=1e-3), None), "callbacks": [RankloomCallback()]} if driven else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Trainer(model, args, train_dataset=data, **ours).train()
    assert sum(WORDS in str(w.message) for w in told) == (0 if driven else 1)
