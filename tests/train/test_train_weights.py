"""Unequal batches weigh as one big batch would, whatever their labels are; a batch without labels weighs nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from train_world import llama, texts

import rankloom as rl
from rankloom.errors import DataError
from rankloom.train.fit import fit
from rankloom.train.loss import IGNORED, Terms, labelled
from rankloom.train.settings import TrainSettings
from tiny import BERT, BLOOM, GPT2, MAMBA, T5, of

I = IGNORED  # noqa: E741
ONE, TWO = torch.tensor([[5, I, I, I]]), torch.tensor([[6, 7, 8, 9], [I, 3, I, 4]])
IDS = torch.tensor([[5, 6, 7, 8]])
CLASSES = {"num_labels": 12}

MODELS: dict[str, tuple[Any, list[str], Any, Any]] = {
    "causal": (llama, ["q_proj"], torch.tensor([[5, 6, I, I]]), TWO),
    "causal with a class name that says nothing": (of("GPT2", "LMHeadModel", **GPT2), ["c_attn"], TWO[1:], TWO),
    "recurrent": (of("Mamba", **MAMBA), ["in_proj"], TWO[1:], TWO),
    "ALiBi": (of("Bloom", **BLOOM), ["query_key_value"], TWO[1:], TWO),
    "encoder-decoder": (of("T5", "ForConditionalGeneration", **T5), ["q"], ONE, TWO),
    "masked": (of("Bert", "ForMaskedLM", **BERT), ["query"], ONE, TWO),
    "tagger": (of("Bert", "ForTokenClassification", **BERT, **CLASSES), ["query"], ONE, TWO),
    "classifier": (of("Bert", "ForSequenceClassification", **BERT, **CLASSES), ["query"], [3], [1, 7, 2]),
    "regression": (of("Bert", "ForSequenceClassification", **BERT, num_labels=1), ["query"], [0.5], [1.0, -7.0, 2.0]),
    "many classes a text": (
        of("Bert", "ForSequenceClassification", **BERT, num_labels=3, problem_type="multi_label_classification"),
        ["query"],
        [[1.0, 0.0, 1.0]],
        [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]],
    ),
}


def batch_of(labels: Any) -> dict[str, torch.Tensor]:
    labels = torch.as_tensor(labels)
    ids = torch.cat([IDS + i for i in range(len(labels))])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trained(model: nn.Module, batches: Any, accumulate: int) -> tuple[list[float], list[torch.Tensor]]:
    model = copy.deepcopy(model)
    found = fit(model, batches, settings=TrainSettings(steps=3, lr=1e-2, accumulate=accumulate, clip=None))
    return found.losses, [p.detach().clone() for _, p, _ in model.rankloom.tensors("default")]


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_equals_one_big_batch(name: str) -> None:
    make, targets, first, second = MODELS[name]
    model = make()
    torch.manual_seed(1)
    rl.attach(model, rl.LoRA(r=2), target_modules=targets)
    a, b = batch_of(first), batch_of(second)
    big = {key: torch.cat([a[key], b[key]]) for key in a}
    losses, tensors = trained(model, [a, b], 2)
    wanted, wanted_tensors = trained(model, [big], 1)
    assert losses == pytest.approx(wanted, rel=1e-5)
    for found, right in zip(tensors, wanted_tensors, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=2e-5)


def test_tuples_weigh_by_their_targets() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 4, I])
    for target in (y, torch.randn(6, 5)):
        parts = [(x[:1], target[:1]), (x[1:], target[1:])]
        one = fit(copy.deepcopy(model), parts, settings=TrainSettings(steps=1, lr=1e-3, accumulate=2)).losses
        big = fit(copy.deepcopy(model), [(x, target)], settings=TrainSettings(steps=1, lr=1e-3)).losses
        assert one == pytest.approx(big, rel=1e-6)


def test_a_model_of_no_library_is_asked_too() -> None:
    """One that shifts and gives 0, not NaN, where there is nothing to predict; and one that does not shift."""

    class Tiny(nn.Module):
        def __init__(self, shift: bool) -> None:
            super().__init__()
            self.shift, self.table = shift, nn.Embedding(64, 64)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.table(input_ids)
            if self.shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            return {"loss": each / (labels != I).sum().clamp(min=1) + 0.5}

    batch = {"input_ids": TWO.clamp(min=0), "labels": TWO}
    assert (Terms(Tiny(True))(batch), Terms(Tiny(False))(batch)) == (5, 6)


def test_asking_leaves_no_trace() -> None:
    model = llama().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    assert Terms(model)(texts(1)[0]) > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_batch_without_labels_weighs_nothing(where: int) -> None:
    """Loss and tensors of the other batches alone."""
    batches = texts(2)
    empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], I)}
    model = llama()
    torch.manual_seed(1)
    rl.attach(model, rl.LoRA(r=2))
    losses, tensors = trained(model, [*batches[:where], empty, *batches[where:]], 3)
    wanted, wanted_tensors = trained(model, batches, 2)
    assert losses == wanted
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted_tensors, strict=True))


def test_a_first_column_alone_is_nothing_for_a_causal_model() -> None:
    batches = texts(1)
    first = {**batches[0], "labels": torch.full_like(batches[0]["labels"], I)}
    first["labels"][:, 0] = 5
    model = llama()
    rl.attach(model, rl.LoRA(r=2))
    assert trained(model, [first, *batches], 2)[0] == trained(model, batches, 1)[0]


def test_a_step_without_any_label_says_so() -> None:
    empty = {**texts(1)[0], "labels": torch.full((2, 9), I)}
    model = llama()
    rl.attach(model, rl.LoRA(r=2))
    with pytest.raises(DataError, match=r"no label to train on in a whole step \(2 batches, every label is -100\)"):
        fit(model, [empty], settings=TrainSettings(steps=1, lr=1e-3, accumulate=2))


def test_what_a_sharded_base_is_called_with() -> None:
    model, empty = llama(), {**texts(1)[0], "labels": torch.full((2, 9), I)}
    assert math.isfinite(model(**labelled(empty)).loss.item())
    x = torch.ones(2, 2)
    assert labelled((x, torch.tensor([I, 1])))[1].tolist() == [0, 1]
    assert labelled([x, torch.tensor([I, 1])])[1].tolist() == [0, 1]
    assert labelled(x) is x
