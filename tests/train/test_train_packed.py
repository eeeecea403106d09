"""Packed rows train as their examples do alone, on every architecture, or packing is refused by name."""

from __future__ import annotations

import copy
from array import array
from typing import Any

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError
from rankloom.train.data import Batches, Example, Examples, Prepared, Records, Where
from rankloom.train.fit import fit
from tiny import BERT, BLOOM, GPT2, MAMBA, MOE, NEOX, OPT, T5, llama_like, of

APART = {
    "Llama": llama_like("Llama"),
    "Qwen3": llama_like("Qwen3", head_dim=8),
    "a window shorter than the examples": llama_like("Mistral", sliding_window=4),
    "windows in turn": llama_like("Gemma2", head_dim=8, sliding_window=4),
    "mixture": llama_like("Qwen3Moe", **MOE),
    "learned positions": of("GPT2", "LMHeadModel", **GPT2),
    "GPT-NeoX": of("GPTNeoX", **NEOX),
}
MIXED = {
    "learned positions from the mask": (of("OPT", **OPT), "OPTForCausalLM"),
    "ALiBi": (of("Bloom", **BLOOM), "BloomForCausalLM"),
    "state space": (of("Mamba", **MAMBA), "MambaForCausalLM"),
    "convolution": (llama_like("Lfm2", layer_types=["conv", "full_attention"]), "Lfm2ForCausalLM"),
    "recurrent": (
        of("Rwkv", vocab_size=64, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        "RwkvForCausalLM",
    ),
    "state space and attention": (
        llama_like("Jamba", num_experts=2, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1),
        "JambaForCausalLM",
    ),
}


def prepared(lengths: Any = (9, 12, 7, 10)) -> Prepared:
    draw, made = torch.Generator().manual_seed(3), []
    for n, length in enumerate(lengths, 1):
        ids = torch.randint(3, 64, (length,), generator=draw).tolist()
        made.append(Example(array("i", ids), b"\0\0" + b"\1" * (length - 2), None, Where("x", n)))
    return Prepared(Examples.of(made), Records((), "text", "x"), 32, 0, None, 0, 0, ())


def losses(model: nn.Module, **options: Any) -> list[float]:
    model = copy.deepcopy(model)
    batches = Batches(prepared(), 4, shuffle=False, **options)
    return fit(model, batches, steps=2, lr=1e-2).losses


def adapted(make: Any) -> nn.Module:
    model = make()
    torch.manual_seed(1)
    rl.attach(model, rl.LoRA(r=2))
    return model


@pytest.mark.parametrize("name", APART)
def test_packed_equals_unpacked(name: str) -> None:
    model = adapted(APART[name])
    assert len(Batches(prepared(), 4, packing=True).rows) < len(Batches(prepared(), 4).rows)
    assert losses(model, packing=True) == pytest.approx(losses(model), rel=2e-5)


@pytest.mark.parametrize("name", MIXED)
def test_or_it_is_refused_by_name(name: str) -> None:
    make, named = MIXED[name]
    model = make()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(
        SettingsError, match=rf"packing=True: {named} .*(keep packed examples apart|position_ids).*packing"
    ):
        losses(model, packing=True)
    assert losses(model)


def test_a_cache_of_the_models_own_choice_is_put_back() -> None:
    model = adapted(APART["Llama"])
    assert model.config.use_cache
    losses(model, packing=True)
    assert model.config.use_cache


def test_evaluation_on_packed_rows_is_looked_at_too() -> None:
    model = MIXED["ALiBi"][0]()
    packed = Batches(prepared(), 2, packing=True)
    with pytest.raises(SettingsError, match="BloomForCausalLM does not keep"):
        fit(model, Batches(prepared(), 2), steps=1, lr=1e-3, evaluate=packed)


def test_every_stream_is_looked_at() -> None:
    model = MIXED["ALiBi"][0]()
    streams = {"new": Batches(prepared(), 2), "old": Batches(prepared(), 2, packing=True)}
    with pytest.raises(SettingsError, match="BloomForCausalLM does not keep"):
        fit(model, streams, steps=1, lr=1e-3, loss=lambda m, b: m(**b["new"]).loss + m(**b["old"]).loss)


def test_rows_of_one_example_each_need_no_look() -> None:
    model = MIXED["state space"][0]()
    single = Batches(prepared((30, 31)), 1, packing=True)
    assert fit(model, single, steps=1, lr=1e-3).steps == 1


def test_half_precision_is_told_from_contamination() -> None:
    model = adapted(lambda: APART["Llama"]().to(torch.bfloat16))
    assert losses(model, packing=True) == pytest.approx(losses(model), rel=2e-2)
    with pytest.raises(SettingsError, match="OPTForCausalLM"):
        losses(MIXED["learned positions from the mask"][0]().to(torch.bfloat16), packing=True)


# Models that see the token that they are to predict.


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (of("Bert", "ForMaskedLM", **BERT), "BertForMaskedLM is no causal model"),
        (of("Bert", "LMHeadModel", **BERT), "BertLMHeadModel is no causal model"),
        (of("Roberta", "ForMaskedLM", **{**BERT, "max_position_embeddings": 66}), "RobertaForMaskedLM is no causal"),
        (of("XLNet", "LMHeadModel", vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48), "XLNetLMHeadModel"),
        (of("T5", "ForConditionalGeneration", **T5), "T5ForConditionalGeneration is an encoder-decoder"),
    ],
)
def test_a_model_that_looks_ahead_is_refused(make: Any, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        losses(make())


def test_a_decoder_made_of_an_encoder_trains() -> None:
    assert losses(of("Bert", "LMHeadModel", **BERT, is_decoder=True)())
