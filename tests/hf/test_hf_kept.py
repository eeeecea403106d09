"""What transformers saves of an adapted model, and heads that it starts at random."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import rankloom as rl
from rankloom.hf.trainer import RankloomCallback, optimizer_for

IDS = torch.arange(3, 15)[None]
TOLD = r"save_pretrained saves the base model; of the adapters 'default' its files.*rankloom\.save"


def llama() -> Any:
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return T.LlamaForCausalLM(config).eval()


def shaken(model: Any, name: str = "default", **plan: Any) -> Any:
    bank = rl.attach(model, rl.LoRA(r=2), name, **plan)
    torch.manual_seed(7)
    with torch.no_grad():
        for _, p, _ in bank.tensors(name):
            p.add_(torch.randn_like(p) * 0.3)
    return model


def read(folder: Path) -> torch.Tensor:
    return T.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def test_save_pretrained_saves_the_base_and_says_so(tmp_path: Path) -> None:
    model = shaken(llama())
    with pytest.warns(UserWarning, match=TOLD) as told:
        model.save_pretrained(tmp_path)
    assert told[0].filename == __file__
    assert torch.equal(read(tmp_path), llama()(IDS).logits)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copied", "pickled"])
def test_a_copy_saves_itself(twin: Any, tmp_path: Path) -> None:
    model = shaken(llama())
    other = twin(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    with pytest.warns(UserWarning, match=TOLD):
        other.save_pretrained(tmp_path)
    assert not read(tmp_path).any()


def test_what_is_merged_or_gone_is_not_told_of(tmp_path: Path) -> None:
    model = shaken(llama())
    adapted = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.rankloom.merge()
        model.save_pretrained(tmp_path / "merged")
        model.rankloom.unmerge()
        rl.detach(model)
        model.save_pretrained(tmp_path / "base")
    assert "save_pretrained" not in vars(model)
    assert torch.allclose(read(tmp_path / "merged"), adapted, atol=1e-5)
    assert torch.equal(read(tmp_path / "base"), model(IDS).logits)
    shaken(model, "a")
    shaken(model, "b")
    model.rankloom.merge("a")
    with pytest.warns(UserWarning, match="of the adapters 'b' its files"):
        model.save_pretrained(tmp_path / "part")


def trainer(model: Any, out: Path, callback: bool) -> Any:
    args = T.TrainingArguments(
        str(out), max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    more = {"optimizers": (optimizer_for(model), None), "callbacks": [RankloomCallback()]} if callback else {}
    return T.Trainer(model, args, train_dataset=data, **more)


@pytest.mark.parametrize("callback", [True, False])
def test_a_trainers_checkpoints_and_its_save_model(callback: bool, tmp_path: Path) -> None:
    """With the callback a checkpoint has the adapter beside; without it, and by `save_model`, it is told of."""
    made = trainer(shaken(llama()), tmp_path, callback)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        made.train()
    assert bool([w for w in told if "rankloom.save" in str(w.message)]) is not callback
    assert (tmp_path / "checkpoint-2" / "rankloom" / "adapters" / "default").is_dir() is callback
    with pytest.warns(UserWarning, match=TOLD):
        made.save_model(str(tmp_path / "final"))
    assert torch.equal(read(tmp_path / "final"), llama()(IDS).logits)


def classifier(base: Path, seed: int, labels: int = 3) -> Any:
    torch.manual_seed(seed)
    return T.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels).eval()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_random_head_that_is_left_behind_is_named(sharded: bool, base: Path, tmp_path: Path) -> None:
    if sharded:
        (base / "model.safetensors").unlink()
        llama().save_pretrained(base, max_shard_size="8KB")
    for settings in ({"target_modules": ["q_proj"]}, {"target_modules": "all-linear"}):
        model = shaken(classifier(base, 1), **settings)
        with pytest.warns(UserWarning, match=r"'score' of this LlamaForSeq.*random.*modules_to_save=\['score'\]"):
            rl.save(model, tmp_path / "a")


def test_a_random_head_goes_along_and_comes_back(base: Path, tmp_path: Path) -> None:
    model = shaken(classifier(base, 1), target_modules=["q_proj"], modules_to_save=["score"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.save(model, tmp_path / "a")
    other = classifier(base, 2)
    rl.load(other, tmp_path / "a")
    assert torch.allclose(other(IDS).logits, model(IDS).logits, atol=1e-6)


def test_a_run_tells_at_its_first_checkpoint(base: Path, tmp_path: Path) -> None:
    model = shaken(classifier(base, 1), target_modules=["q_proj"])
    batch = {"input_ids": IDS, "labels": torch.tensor([1])}
    with pytest.warns(UserWarning, match="'score' of this"):
        rl.fit(model, [batch], steps=1, out=tmp_path / "run")


def test_heads_that_are_in_the_files_or_tied_are_not_told_of(base: Path, tmp_path: Path) -> None:
    classifier(base, 1).save_pretrained(tmp_path / "whole")
    tied = T.LlamaForCausalLM(T.LlamaConfig(**{**llama().config.to_diff_dict(), "tie_word_embeddings": True}))
    tied.save_pretrained(tmp_path / "tied")
    bert = T.BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    T.BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    T.BertModel(bert).save_pretrained(tmp_path / "bare")
    quiet = [
        classifier(tmp_path / "whole", 2),
        T.AutoModelForCausalLM.from_pretrained(tmp_path / "tied"),
        T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert"),
        T.AutoModelForCausalLM.from_pretrained(base),
        llama(),
    ]
    for number, model in enumerate(quiet):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rl.save(shaken(model, target_modules="all-linear"), tmp_path / str(number))
    loud = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match="'classifier' of this BertForSequenceClassification"):
        rl.save(shaken(loud, target_modules="all-linear"), tmp_path / "loud")


@pytest.mark.parametrize("content", [b"", b"x" * 99, b"\xff" * 8, None])
def test_files_that_cannot_be_read_do_not_hinder_a_save(content: bytes | None, base: Path, tmp_path: Path) -> None:
    model = shaken(classifier(base, 1), target_modules=["q_proj"])
    (base / "model.safetensors").unlink()
    if content is not None:
        (base / "model.safetensors").write_bytes(content)
    assert rl.save(model, tmp_path / "a").tensors == 4
