"""What a model does that no layer shows: towers, fused experts, vocabularies that grow, rows that are not first."""

from __future__ import annotations

import pytest
import torch
import transformers as T
from core_tiny import nudge
from torch import nn

import rankloom as rl
import tiny
from rankloom.errors import StateError, TargetError

SIZES = {**tiny.SIZES, "num_hidden_layers": 1}


def llama():
    return tiny.llama(num_hidden_layers=1).eval()


def names(bank):
    return [name for name, _ in bank.adapters()]


@pytest.mark.parametrize(
    "excluded", [["mlp"], ["layers.0.mlp"], r".*\.mlp", ["self_attn", "mlp.down_proj"], ["layers"]]
)
def test_excluding_a_container_excludes_what_is_in_it(excluded):
    model = llama()
    if excluded == ["layers"]:
        with pytest.raises(TargetError, match="nothing is left after exclude_modules"):
            rl.attach(model, rl.LoRA(r=2), exclude_modules=excluded)
        return
    found = names(rl.attach(model, rl.LoRA(r=2), exclude_modules=excluded))
    left = {"mlp": [n for n in found if ".mlp." in n], "attention": [n for n in found if ".self_attn." in n]}
    if "self_attn" in excluded:
        assert (len(left["mlp"]), left["attention"]) == (2, [])
    else:
        assert (left["mlp"], len(left["attention"])) == ([], 4)


def llava():
    vision = T.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return T.LlavaForConditionalGeneration(
        T.LlavaConfig(vision_config=vision, text_config=T.LlamaConfig(**SIZES), image_token_index=31)
    )


def clip():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return T.CLIPModel(
        T.CLIPConfig(
            text_config={**sizes, "vocab_size": 32},
            vision_config={**sizes, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )  # fmt: skip
    )


@pytest.mark.parametrize("make", [llava, clip])
@pytest.mark.parametrize(
    ("word", "inside", "other"), [("language", ("language", "text"), "vision"), ("vision", ("vision",), "text")]
)
def test_a_tower_by_its_word(tmp_path, make, word, inside, other):
    bank = rl.attach(make(), rl.LoRA(r=2), target_modules=word)
    found = names(bank)
    assert len(found) >= 6
    assert all(any(part in name for part in inside) and other not in name for name in found), found
    assert not any("projector" in name for name in found)
    rl.save(bank.model, tmp_path / "a")
    again = make()
    again.load_state_dict({k: v for k, v in bank.model.state_dict().items() if ".adapters." not in k})
    rl.load(again, tmp_path / "a")
    assert names(again.rankloom) == found


def test_a_word_for_a_tower_that_is_not_there():
    with pytest.raises(TargetError, match="'audio'.*it has 'language', 'vision'"):
        rl.attach(clip(), rl.LoRA(r=2), target_modules="audio")
    with pytest.raises(TargetError, match="not made of towers; 'all-linear'"):
        rl.attach(llama(), rl.LoRA(r=2), target_modules="vision")


def mixtral():
    torch.manual_seed(0)
    return T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)).eval()


def test_fused_experts_are_named_and_have_a_word():
    with pytest.warns(UserWarning, match=r"leaves out .*experts.* and 1 more: target_parameters='all-experts'"):
        bank = rl.attach(mixtral(), rl.LoRA(r=2))
    assert not any("experts" in name for name in names(bank))
    bank = rl.attach(mixtral(), rl.LoRA(r=2), target_parameters="all-experts")
    experts = [name for name in names(bank) if "experts" in name]
    assert len(experts) == 2
    nudge(bank)
    ids = torch.arange(3, 9)[None]
    given = bank.model(ids).logits
    bank.merge()
    torch.testing.assert_close(bank.model(ids).logits, given, rtol=0, atol=1e-5)
    with pytest.raises(TargetError, match="'all-experts': this model keeps no experts"):
        rl.attach(llama(), rl.LoRA(r=2), target_parameters="all-experts")


@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": (1, 2)},
    ],
)
def test_a_vocabulary_that_grows_takes_no_adapter_away(where):
    model = llama()
    rl.attach(model, rl.LoRA(r=2), **where)
    with pytest.raises(StateError, match=r"resize_token_embeddings.*'default'.*before you attach"):
        model.resize_token_embeddings(40)
    assert model.get_input_embeddings().num_embeddings == 32
    rl.detach(model)
    model.resize_token_embeddings(40)
    rl.attach(model, rl.LoRA(r=2), **where)


def test_a_vocabulary_may_grow_beside_adapters():
    model = llama()
    bank = rl.attach(model, rl.LoRA(r=2))
    nudge(bank)
    before = model(torch.arange(3, 9)[None]).logits
    model.resize_token_embeddings(40)
    torch.testing.assert_close(model(torch.arange(3, 9)[None]).logits[..., :32], before)
    rl.detach(model)
    assert "resize_token_embeddings" not in vars(model)


def test_a_layer_that_was_replaced_is_told_where_it_would_be_lost(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    bank = rl.attach(model, rl.LoRA(r=2))
    model[1] = nn.Linear(4, 5)
    for call in (bank.merge, lambda: rl.save(model, tmp_path / "a"), lambda: bank.state("default")):
        with pytest.raises(StateError, match="layer '1' was replaced after adapter 'default'"):
            call()
    rl.detach(model)


def xlnet():
    return T.XLNetLMHeadModel(
        T.XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=24, dropout=0)
    ).eval()


class TimeFirst(nn.Module):
    """Transposes inside, and says so nowhere."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("tokens", [2, 3, 4, 6])
def test_rows_that_are_not_first_are_refused(tokens):
    for make, x in (
        (xlnet, torch.ones(2, tokens, dtype=torch.long)),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4), 1).eval(), torch.randn(tokens, 2, 4)),
        *([(TimeFirst, torch.randn(2, tokens, 4))] if tokens != 2 else []),
    ):
        model = make()
        for name in "ab":
            rl.attach(model, rl.LoRA(r=2), name)
        for chosen in ({"rows": ["a", "b"]}, {"a": torch.tensor([1.0, 0.0])}):
            with pytest.raises(StateError, match="per-row adapters"), model.rankloom.using(**chosen):
                model(x)


class Beside(nn.Module):
    """A part that computes time first, with no adapter in it."""

    def __init__(self):
        super().__init__()
        self.pool, self.body = nn.ModuleList([nn.MultiheadAttention(4, 2)]), nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return self.body(x)


def test_rows_are_chosen_where_another_part_computes_time_first(monkeypatch):
    model, x = Beside().eval(), torch.randn(2, 3, 4)
    for name in "ab":
        nudge(rl.attach(model, rl.LoRA(r=2), name, target_modules=["body.0"]), name)
    looked = []
    walk = rl.core.bank.time_first
    monkeypatch.setattr(rl.core.bank, "time_first", lambda *given: looked.append(1) or walk(*given))
    for _ in range(3):
        with model.rankloom.using(rows=["a", "b"]):
            model(x)
    assert len(looked) == 1
