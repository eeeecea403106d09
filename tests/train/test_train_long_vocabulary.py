"""Loss by chunks of tokens: the value and the gradients of the whole loss, in a fraction of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_world import llama, mlp, points, texts

import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.jobs.plan import saved_bytes
from rankloom.ops.chunked import chunked_cross_entropy
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat
from rankloom.train.chunked_loss import ChunkedLoss
from rankloom.train.fit import fit
from rankloom.train.loss import Loss, default_loss
from rankloom.train.settings import TrainSettings


def problem(n: int = 23, d: int = 6, v: int = 41, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(v, (n,), generator=draw)
    labels[::4] = -100
    head = nn.Linear(d, v, dtype=torch.float64)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return hidden, labels, head


def gradients(loss: torch.Tensor, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(3 * loss, tensors))


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
def test_the_loss_and_every_gradient_are_those_of_the_whole(chunk: int) -> None:
    hidden, labels, head = problem()
    tensors = [hidden, head.weight, head.bias]
    whole = F.cross_entropy(head(hidden), labels)
    ours = chunked_cross_entropy(head, hidden, labels, list(head.parameters()), chunk=chunk)
    torch.testing.assert_close(ours, whole, rtol=1e-13, atol=0)
    for one, two in zip(gradients(ours, tensors), gradients(whole, tensors), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)


def test_a_number_of_terms_takes_the_place_of_the_mean() -> None:
    hidden, labels, head = problem()
    ours = chunked_cross_entropy(head, hidden, labels, chunk=5, terms=10)
    torch.testing.assert_close(ours, F.cross_entropy(head(hidden), labels, reduction="sum") / 10)


def test_parameters_that_share_a_gradient_do_not_add_into_each_other() -> None:
    hidden, labels, head = problem()
    more = nn.Parameter(torch.zeros(41, dtype=torch.float64))
    chunked = chunked_cross_entropy(
        lambda h: F.linear(h, head.weight, head.bias + more), hidden, labels, [head.bias, more], chunk=4
    )
    whole = F.cross_entropy(head(hidden), labels)
    one, two = torch.autograd.grad(chunked, [head.bias, more])
    expected = torch.autograd.grad(whole, [head.bias])[0]
    torch.testing.assert_close(one, expected)
    torch.testing.assert_close(two, expected)


def test_nothing_to_predict_is_a_loss_of_zero_with_zero_gradients() -> None:
    hidden, labels, head = problem()
    loss = chunked_cross_entropy(head, hidden, torch.full_like(labels, -100), list(head.parameters()), chunk=4)
    assert float(loss.detach()) == 0
    assert all(not g.any() for g in gradients(loss, [hidden, head.weight]))
    empty = chunked_cross_entropy(head, hidden[:0], labels[:0], list(head.parameters()), chunk=4)
    assert float(empty.detach()) == 0
    assert all(not g.any() for g in gradients(empty, [hidden, head.weight]))


def test_without_gradients_nothing_is_kept() -> None:
    hidden, labels, head = problem()
    with torch.no_grad():
        loss = chunked_cross_entropy(head, hidden, labels, list(head.parameters()), chunk=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden), labels).detach())


HEADS: dict[str, dict[str, Any]] = {
    "plain": {"plan": rl.LoRA(r=3), "target_modules": ["o_proj", "up_proj"]},
    "LoRA": {"plan": rl.LoRA(r=3), "target_modules": ["o_proj", "lm_head"]},
    "DoRA": {"plan": rl.DoRA(rl.LoRA(r=3)), "target_modules": ["o_proj", "lm_head"]},
    "VeRA": {"plan": rl.VeRA(r=3), "target_modules": ["lm_head"]},
    "whole": {"plan": rl.LoRA(r=3), "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "rows": {"plan": rl.LoRA(r=3), "target_modules": ["o_proj"], "trainable_token_indices": [3, 9, 11]},
}


def model_with(head: str, packed: bool = False, tied: bool = False) -> tuple[nn.Module, rl.Bank]:
    model = llama().double()
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    if packed:
        keep(model, {"lm_head.weight": NormalFloat()})
    bank = rl.attach(model, **HEADS[head])
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p, _ in bank.trainable():
            p.add_(0.05 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    return model, bank


def assert_same(model: nn.Module, bank: rl.Bank, chunk: int = 5) -> None:
    for batch in texts(2):
        found = []
        for loss in (default_loss, ChunkedLoss(chunk)):
            model.zero_grad()
            value = loss(model, batch)
            value.backward()
            found.append((value.detach(), {k: p.grad.clone() for k, p, _ in bank.trainable()}))
        (one, first), (two, second) = found
        torch.testing.assert_close(two.float(), one, rtol=1e-6, atol=0)
        assert first.keys() == second.keys()
        for key, gradient in first.items():
            torch.testing.assert_close(second[key], gradient, rtol=1e-4, atol=1e-8, msg=key)


@pytest.mark.parametrize("head", HEADS)
def test_a_real_model_has_the_same_loss_and_gradients(head: str) -> None:
    assert_same(*model_with(head, tied=head == "rows"))


@pytest.mark.parametrize("head", ["plain", "LoRA"])
def test_over_a_packed_head(head: str) -> None:
    assert_same(*model_with(head, packed=True))


def test_the_model_is_left_as_it_was() -> None:
    model, _ = model_with("plain")
    batch = texts(1)[0]
    before = model(**batch)
    ChunkedLoss(4)(model, batch)
    after = model(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert "forward" not in model.lm_head.__dict__


def test_a_run_by_chunks_is_the_run_without() -> None:
    found = []
    for chunk in (None, 4):
        model, _ = model_with("LoRA")
        chosen = TrainSettings(steps=5, lr=1e-2, chunked_loss=chunk)
        result = fit(model, texts(), settings=chosen, evaluate=texts(2))
        found.append(torch.tensor([*result.losses, result.metrics["after"]["loss"]]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)
    assert found[0][-2] < found[0][0]


class Losing(nn.Module):
    """A model with its loss as one module."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, **batch: torch.Tensor) -> torch.Tensor:
        return self.loss(self.model, batch)


def test_saved_memory_no_longer_grows_with_the_vocabulary() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 8000, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"])
    ids = torch.randint(8000, (2, 64))
    batch = {"input_ids": ids, "labels": ids}
    whole = saved_bytes(Losing(model, default_loss), batch)
    ours = saved_bytes(Losing(model, ChunkedLoss(16)), batch)
    logits = 4 * 2 * 64 * 8000
    assert whole > logits
    assert ours < 0.1 * logits


class Unlike:
    """Models whose loss is not the cross entropy of the head's output."""

    @staticmethod
    def capped() -> nn.Module:
        from transformers import Gemma2Config, Gemma2ForCausalLM

        return Gemma2ForCausalLM(
            Gemma2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        )  # fmt: skip

    @staticmethod
    def scaled() -> nn.Module:
        from transformers import CohereConfig, CohereForCausalLM

        return CohereForCausalLM(
            CohereConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, logit_scale=0.0625)
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "named"), [(Unlike.capped, "final_logit_softcapping=30"), (Unlike.scaled, "logit_scale=0.06")]
)
def test_logits_that_are_changed_behind_the_head_are_refused_by_name(make: Any, named: str) -> None:
    model = make()
    rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"])
    with pytest.raises(SettingsError, match=named):
        fit(model, texts(), settings=TrainSettings(steps=2, chunked_loss=8))
    assert "forward" not in model.lm_head.__dict__


def test_what_has_no_head_or_no_labels_is_refused() -> None:
    with pytest.raises(SettingsError, match="mappings with 'labels'"):
        fit(mlp(), points(), settings=TrainSettings(steps=2, chunked_loss=8))
    model, bank = model_with("LoRA")
    with pytest.raises(SettingsError, match="another: give one of them"):
        fit(model, texts(), loss=default_loss, settings=TrainSettings(steps=2, chunked_loss=8))
    bank.use(default=torch.ones(2))
    with pytest.raises(SettingsError, match="a weight for each row"):
        fit(model, texts(), settings=TrainSettings(steps=2, chunked_loss=8))
    with pytest.raises(SettingsError, match="chunked_loss=0"):
        TrainSettings(chunked_loss=0)
