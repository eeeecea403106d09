"""Objectives: values against TRL and against sums written down, the base's own answers, and what they do in a run."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import rankloom as rl
import tiny
from rankloom import registry
from rankloom.errors import SettingsError, StateError
from rankloom.objectives.base import Objective, log_probs
from rankloom.objectives.distillation import Distillation
from rankloom.objectives.forgetting import NPO, GradientAscent, InvertedHinge
from rankloom.objectives.preference import DPO, KTO, ORPO, SimPO
from rankloom.objectives.reference import base_answers
from rankloom.objectives.sft import SFT
from rankloom.train.fit import fit

WORDS = 24


def llama(adapted: bool = True) -> LlamaForCausalLM:
    model = tiny.llama(vocab_size=WORDS, num_hidden_layers=1, eos_token_id=1, bos_token_id=2)
    if adapted:
        torch.manual_seed(1)
        rl.attach(model, rl.LoRA(r=4, lora_alpha=16), target_modules=["q_proj", "up_proj"])
        for _, p, _ in model.rankloom.trainable():
            p.data += 0.3 * torch.randn_like(p)
    return model


def batch(seed: int = 3, rows: int = 3, length: int = 8) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pairs() -> dict[str, torch.Tensor]:
    return {f"{name}_{k}": v for i, name in enumerate(("chosen", "rejected")) for k, v in batch(i + 5).items()}


def split(found: dict[str, Any], name: str) -> dict[str, Any]:
    return {k.removeprefix(f"{name}_"): v for k, v in found.items() if k.startswith(name)}


def logps(model: Any, rows: dict[str, Any], mean: bool = False) -> torch.Tensor:
    """Written down token by token."""
    inputs = {k: v for k, v in rows.items() if k != "labels"}
    logs = model(**inputs).logits.log_softmax(-1)
    each = []
    for i, row in enumerate(rows["labels"]):
        found = [logs[i, t - 1, row[t]] for t in range(1, len(row)) if row[t] != -100]
        each.append(sum(found) / (len(found) if mean else 1))
    return torch.stack(each)


def test_sft_is_the_models_own_loss():
    model, rows = llama(), batch()
    assert SFT()(model, {"train": rows}).item() == pytest.approx(model(**rows).loss.item(), abs=1e-6)


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<bos>", *"abcdefghijklmnopqrstu"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


USUAL = {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "bf16": False, "save_strategy": "no",
         "gradient_checkpointing": False, "disable_dropout": False}  # fmt: skip


def test_dpo_is_that_of_trl(tmp_path):
    """TRL's DPOTrainer with a second copy of the base as reference: the same loss on the same batch."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = llama()
    settings = {**USUAL, "beta": 0.3, "loss_type": ["sigmoid"]}
    rows = [
        {"prompt": "a b", "chosen": " c d e", "rejected": " f g"},
        {"prompt": "h", "chosen": " i", "rejected": " j k"},
    ]
    trainer = DPOTrainer(
        llama(), llama(adapted=False), DPOConfig(str(tmp_path), **settings), train_dataset=Dataset.from_list(rows * 2),
        processing_class=tokenizer(),
    )  # fmt: skip
    given = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, dict(given))
    labels = given["input_ids"].masked_fill(given["completion_mask"] == 0, -100)
    each = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "labels": labels}
    half = len(labels) // 2
    ours = {f"chosen_{k}": v[:half] for k, v in each.items()} | {f"rejected_{k}": v[half:] for k, v in each.items()}
    found = DPO(beta=0.3)(model, {"pairs": ours})
    assert found.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert abs(found.item() - math.log(2)) > 1e-3


def test_kto_is_that_of_trl(tmp_path):
    """TRL's KTOTrainer with its mismatched completions for the KL term."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    settings = {**USUAL, "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}
    rows = [
        {"prompt": "a b", "completion": " c d e", "label": True}, {"prompt": "h", "completion": " j k", "label": False},
        {"prompt": "l m", "completion": " n", "label": True}, {"prompt": "o", "completion": " p q r", "label": False},
    ]  # fmt: skip
    trainer = KTOTrainer(
        llama(), llama(adapted=False), KTOConfig(str(tmp_path), **settings), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )  # fmt: skip
    given = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, dict(given))

    def part(prefix: str) -> dict[str, torch.Tensor]:
        ids, mask = given[f"{prefix}input_ids"], given[f"{prefix}completion_mask"]
        return {
            "input_ids": ids, "attention_mask": given[f"{prefix}attention_mask"],
            "labels": ids.masked_fill(mask == 0, -100),
        }  # fmt: skip

    ours = {**part(""), **{f"kl_{k}": v for k, v in part("KL_").items()}, "desirable": torch.tensor(given["label"])}
    objective = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    assert objective(llama(), {"answers": ours}).item() == pytest.approx(theirs.item(), abs=1e-5)


def test_orpo_and_simpo_are_those_of_trl():
    """The losses of TRL's ORPOTrainer and CPOTrainer (SimPO) on mean log-probabilities."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    model, rows = llama(), pairs()
    good, bad = (logps(model, split(rows, name), mean=True) for name in ("chosen", "rejected"))
    stub = SimpleNamespace(
        beta=0.4, accelerator=SimpleNamespace(device="cpu"), loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.0,
        cpo_alpha=0.0, alpha=0.0, loss_types=["simpo"],
    )  # fmt: skip
    theirs = ORPOTrainer.odds_ratio_loss(stub, good, bad)[0]
    nll = model(**split(rows, "chosen")).loss
    want = nll - theirs.mean()
    assert ORPO(beta=0.4)(model, {"pairs": rows}).item() == pytest.approx(want.item(), abs=1e-5)
    theirs = CPOTrainer.cpo_loss(stub, good, bad)[0].mean()
    assert SimPO(beta=0.4, gamma=0.7)(model, {"pairs": rows}).item() == pytest.approx(theirs.item(), abs=1e-5)


def test_unlearning_losses_are_their_formulas():
    """NPO, gradient ascent and the inverted hinge, written down; retain counts by its weight."""
    model, base, forget, retain = llama(), llama(adapted=False).eval(), batch(8), batch(9)
    streams = {"forget": forget, "retain": retain}
    kept = 0.5 * model(**retain).loss
    ratio = logps(model, forget) - logps(base, forget)
    npo = 2 / 0.2 * torch.log1p((torch.exp(ratio)) ** 0.2).mean()
    assert NPO(beta=0.2, retain_weight=0.5)(model, streams).item() == pytest.approx((npo + kept).item(), abs=1e-5)
    ascent = -model(**forget).loss
    assert GradientAscent(retain=None)(model, {"forget": forget}).item() == pytest.approx(ascent.item(), abs=1e-6)
    p = model(input_ids=forget["input_ids"], attention_mask=forget["attention_mask"]).logits.softmax(-1)
    each = []
    for i, row in enumerate(forget["labels"]):
        for t in range(1, len(row)):
            if row[t] != -100:
                rivals = [p[i, t - 1, v] for v in range(WORDS) if v != row[t]]
                each.append(1 + p[i, t - 1, row[t]] - max(rivals))
    want = torch.stack(each).mean()
    assert InvertedHinge(retain=None)(model, streams).item() == pytest.approx(want.item(), abs=1e-5)


def test_npo_at_the_base_is_gradient_ascent():
    """At the start (the model is the base) NPO's gradient is that of −ℓ mean over rows: arXiv 2404.05868 §3."""
    model = llama(adapted=False)
    rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"])
    rows = batch()
    parameters = [p for _, p, _ in model.rankloom.trainable()]
    mine = torch.autograd.grad(NPO(beta=0.1, retain=None)(model, {"forget": rows}), parameters)
    theirs = torch.autograd.grad(log_probs(model(input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"]).logits, rows["labels"]).mean(), parameters)  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, theirs))
    assert any(float(a.abs().max()) > 0 for a in mine)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_a_kl_to_the_base(temperature):
    model, base, rows = llama(), llama(adapted=False), batch()
    inputs = {k: v for k, v in rows.items() if k != "labels"}
    picked = rows["labels"][:, 1:] != -100
    mine, theirs = (m(**inputs).logits[:, :-1][picked] / temperature for m in (model, base))
    want = temperature**2 * F.kl_div(mine.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
    objective = Distillation(temperature=temperature)
    assert objective(model, {"train": rows}).item() == pytest.approx(want.item(), abs=1e-5)
    with model.rankloom.using():
        assert objective(model, {"train": rows}).item() == pytest.approx(0.0, abs=1e-6)


def test_the_base_answers_for_itself():
    """No adapter, evaluation mode, no gradients, no random numbers; modes are put back; the cache asks once."""
    model, base, rows = llama().train(), llama(adapted=False).eval(), batch()
    asked: list[bool] = []

    def read(m: Any, given: Any) -> torch.Tensor:
        asked.append(m.training)
        return m(input_ids=given["input_ids"]).logits

    state, cache = torch.get_rng_state(), {}
    found = base_answers(model, rows, read, cache)
    assert torch.equal(found, base(input_ids=rows["input_ids"]).logits)
    assert not found.requires_grad
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    again = {k: v.clone() for k, v in rows.items()}
    assert base_answers(model, again, read, cache) is found
    again["input_ids"][0, 0] += 1
    assert base_answers(model, again, read, cache) is not found
    assert asked == [False, False]
    with pytest.raises(StateError, match="attach"):
        base_answers(base, rows, read)


def test_what_is_missing_is_named():
    """Not silent: a stream, columns, a setting out of range, an unknown objective."""
    model = llama()
    with pytest.raises(SettingsError, match=r"'forget'.*'forgets'"):
        NPO()(model, {"forgets": batch()})
    with pytest.raises(SettingsError, match="chosen_input_ids"):
        DPO()(model, {"pairs": batch()})
    with pytest.raises(SettingsError, match="desirable"):
        KTO()(model, {"answers": batch()})
    for make in (DPO, NPO, SimPO, ORPO, KTO):
        with pytest.raises(SettingsError, match=r"beta=0\.0"):
            make(beta=0.0)
    with pytest.raises(SettingsError, match=r"'npos'.*'npo'"):
        registry.objective("npos")


def test_every_objective_is_registered_and_trains():
    """Each registered objective runs in `fit` over its streams and comes down; the base stays as it is."""
    rows, other = batch(11), batch(12)
    answers = {**rows, **{f"kl_{k}": v for k, v in other.items()}, "desirable": torch.tensor([1, 0, 1])}
    streams = {"train": rows, "pairs": pairs(), "answers": answers, "forget": rows, "retain": other}
    for name in registry.OBJECTIVES:
        objective = registry.objective(name)
        assert isinstance(objective, Objective)
        model = llama()
        before = model.model.embed_tokens.weight.clone()
        wanted = {v for v in vars(objective).values() if isinstance(v, str)}
        found = fit(model, {n: [streams[n]] for n in wanted}, steps=8, lr=0.02, loss=objective)
        assert found.losses[-1] < found.losses[0] - 1e-4, name
        assert found.tokens > 0 or name in ("dpo", "orpo", "simpo")
        assert torch.equal(before, model.model.embed_tokens.weight)
