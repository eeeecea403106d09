"""Another base is refused by both fingerprints; the same base is not, whatever it was cast to."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from formats_tiny import X, adapted, bare, net, saved, shake

import rankloom as rl
from rankloom.core.fingerprint import check_print, difference, fingerprint, short
from rankloom.errors import FileError
from rankloom.files.manifest import read_manifest, sealed
from rankloom.store.model import keep
from rankloom.store.normalfloat import NormalFloat


def manifest(folder):
    return read_manifest((folder / "manifest.json").read_bytes(), "m", "rankloom-adapter")


def edited(name, change):
    model = net()
    with torch.no_grad():
        model.get_parameter(name).copy_(change(model.get_parameter(name)))
    return model


def test_the_manifest_names_the_base_and_adapters_do_not_count(tmp_path):
    saved(tmp_path / "a")
    assert manifest(tmp_path / "a")["base"] == fingerprint(net()) == fingerprint(adapted())
    assert check_print(fingerprint(net())) is None


def wider():
    model = net()
    model.extra = torch.nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: net(seed=6), "the values of 'layers.0.q.bias' differ"),
        (lambda: edited("norm.weight", lambda w: w * 1.01), "the values of 'norm.weight' differ"),
        (lambda: edited("score.weight", lambda w: w * 1.001), "the values of 'score.weight' differ"),
        (lambda: edited("layers.0.v.weight", lambda w: w.flip(0)), r"the values of 'layers.0.v.weight' differ"),
        (lambda: wider(), r"names or shapes of the parameters differ \(14 here, 12 then\)"),
    ],
)
def test_another_base_is_refused_by_both_names(model, words, tmp_path):
    folder = saved(tmp_path / "a")
    other = model()
    here, there = short(fingerprint(other)), short(manifest(folder)["base"])
    with pytest.raises(FileError, match=f"{words}. Its base: {there}.*this model: {here}"):
        rl.load(other, folder)
    assert not hasattr(other, "rankloom")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_re_cast_is_the_same_base(dtype, tmp_path):
    folder = saved(tmp_path / "a")
    rl.load(net().to(dtype), folder)
    rl.load(net().to(dtype).float(), folder)
    cast = net().to(dtype)
    rl.attach(cast, rl.LoRA(r=2), target_modules=["q"])
    rl.save(cast, tmp_path / "b")
    rl.load(net(), tmp_path / "b")


def test_a_merged_base_and_a_packed_base_are_other_bases(tmp_path):
    folder = saved(tmp_path / "a")
    merged = adapted()
    merged.rankloom.fold("default")
    rl.detach(merged)
    with pytest.raises(FileError, match="the values of 'layers.0.q.weight' differ"):
        rl.load(merged, folder)
    packed = net()
    keep(packed, {"layers.0.q.weight": NormalFloat()})
    with pytest.raises(FileError, match="the weights are NormalFloat here and were not packed"):
        rl.load(packed, folder)
    rl.attach(packed, rl.LoRA(r=2), target_modules=["q"])
    rl.save(packed, tmp_path / "b")
    again = net()
    keep(again, {"layers.0.q.weight": NormalFloat()})
    rl.load(again, tmp_path / "b")


def test_a_head_that_the_adapter_replaces_may_differ(tmp_path):
    folder = saved(tmp_path / "a", modules_to_save=["score"])
    other = edited("score.weight", torch.zeros_like)
    rl.load(other, folder)
    with pytest.raises(FileError, match="'layers.1.q.weight'"):
        rl.load(edited("layers.1.q.weight", torch.zeros_like), folder)


def test_the_override_loads_and_is_logged(tmp_path, caplog):
    folder = saved(tmp_path / "a")
    with caplog.at_level(logging.WARNING, "rankloom"):
        rl.load(net(seed=6), folder, base_check=False)
    assert "loaded without a check of its base model (base_check=False)" in caplog.text


def test_an_unknown_base_is_a_warning_or_refused(tmp_path):
    folder = bare(tmp_path / "a")
    with pytest.warns(UserWarning, match="nothing says which weights"):
        rl.load(net(), folder)
    with pytest.raises(FileError, match="unknown_base='warn'"):
        rl.load(net(), folder, unknown_base="refuse")


def test_saved_while_merged_the_base_is_unknown(tmp_path):
    model = adapted()
    model.rankloom.merge("default")
    rl.save(model, tmp_path / "a")
    assert manifest(tmp_path / "a")["base"] is None
    with pytest.warns(UserWarning, match="nothing says which weights"):
        rl.load(net(), tmp_path / "a")


@pytest.mark.parametrize(
    "base", [3, {}, {"config": {}}, {**fingerprint(net()), "sketch": "zz"}, {**fingerprint(net()), "tensors": 10**9}]
)
def test_a_fingerprint_that_is_none_is_refused(base, tmp_path):
    folder = saved(tmp_path / "a")
    said = manifest(folder)
    files = {name: (folder / name).read_bytes() for name in said["files"]}
    about = {key: said[key] for key in ("kind", "versions", "plan")}
    (folder / "manifest.json").write_bytes(sealed(files, {**about, "base": base})["manifest.json"])
    with pytest.raises(FileError, match="'base'"):
        rl.load(net(), folder)


def test_config_fields_that_no_shape_shows():
    class Config:
        def __init__(self, **fields):
            self.fields = fields

        def to_dict(self):
            return self.fields

    def print_of(**fields):
        model = net()
        model.config = Config(**fields)
        return model, fingerprint(model)

    def words(old, new):
        model, now = print_of(**new)
        return difference(model, print_of(**old)[1], now, ())

    assert words({"num_attention_heads": 4}, {"num_attention_heads": 8}) == "num_attention_heads is 8 here and was 4"
    assert words({"rope_theta": 1e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}) is None
    assert "rope_theta is" in words({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 5e5}})
    assert "rope is" in words({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": {"type": "x"}})
    assert words({"transformers_version": "4", "use_cache": True}, {"transformers_version": "5"}) is None
    assert words({"hidden_act": "silu"}, {}) is None, "a field that a later version dropped"
    assert json.dumps(print_of(layer_types=["a", "b"])[1])


def test_a_larger_adapter_beside_changes_nothing(tmp_path):
    folder = saved(tmp_path / "a")
    model = net()
    shake(rl.attach(model, rl.DoRA(rl.LoRA(r=2)), "other", target_modules=["q", "score"]), "other")
    bank = rl.load(model, folder)
    bank.use("default")
    assert torch.equal(model(X), adapted()(X))


class Statistics(torch.nn.Module):
    def __init__(self, activation=torch.nn.ReLU, eps=1e-5):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.norm = torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5, eps=eps)
        self.act, self.out = activation(), torch.nn.Linear(5, 3)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.out(self.act(self.norm(self.fc(x)))) * self.table.sum()


def _shift(name):
    def make():
        model = Statistics()
        dict(model.named_buffers())[name].add_(5)
        return model

    return make


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_shift("norm.running_mean"), "the values of 'norm.running_mean' differ"),
        (_shift("norm.running_var"), "the values of 'norm.running_var' differ"),
        (_shift("table"), "the values of 'table' differ"),
        (lambda: Statistics(torch.nn.GELU), "of other classes or have other settings"),
        (lambda: Statistics(eps=1e-3), "of other classes or have other settings"),
        (_shift("scratch"), None),
        (_shift("norm.num_batches_tracked"), None),
        (lambda: Statistics().eval(), None),
    ],
)
def test_buffers_and_modules_are_part_of_the_base(make, words, tmp_path):
    model = Statistics()
    rl.attach(model, rl.LoRA(r=2))
    rl.save(model, tmp_path / "a")
    if words is None:
        rl.load(make(), tmp_path / "a")
        return
    with pytest.raises(FileError, match=words):
        rl.load(make(), tmp_path / "a")


TYPES = {
    "gpt_neox": {"use_parallel_residual": False, "rotary_pct": 0.5, "hidden_act": "relu"},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": None},
    "falcon": {"alibi": True},
    "olmo": {"clip_qkv": 8.0},
    "bloom": {"apply_residual_connection_post_layernorm": True},
    "deepseek_v3": {"routed_scaling_factor": 1.0, "norm_topk_prob": False, "topk_group": 1},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gemma2": {"final_logit_softcapping": 10.0, "query_pre_attn_scalar": 64, "sliding_window": 7},
    "llama": {"rms_norm_eps": 1e-3, "rope_theta": 5.0},
    "bert": {"hidden_act": "relu", "layer_norm_eps": 1e-3, "is_decoder": True},
    "t5": {"relative_attention_max_distance": 7, "feed_forward_proj": "gated-gelu"},
    "whisper": {"scale_embedding": True, "activation_function": "relu"},
    "vit": {"layer_norm_eps": 1e-3, "patch_size": 4},
    "mamba": {"time_step_floor": 0.5, "residual_in_fp32": False},
}
CARELESS = {"dtype": "float16", "use_cache": False, "pad_token_id": 3, "id2label": {"0": "a"}, "name_or_path": "x"}


@pytest.mark.parametrize("kind", TYPES)
def test_every_field_of_a_config_that_is_not_known_to_be_neutral_counts(kind):
    from types import SimpleNamespace

    from transformers import AutoConfig

    def said(**changes):
        model = net()
        config = AutoConfig.for_model(kind, **changes)
        model.config = SimpleNamespace(to_dict=config.to_dict)
        return model, fingerprint(model)

    usual, before = said()
    for field, value in TYPES[kind].items():
        if value is None:
            continue
        _, other = said(**{field: value})
        assert difference(usual, other, before, ()) is not None, field
    for field, value in CARELESS.items():
        _, other = said(**{field: value})
        assert difference(usual, other, before, ()) is None, field


@pytest.mark.parametrize("rows", [[7], [0], [19_999], [3, 500, 12_345]])
@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_one_retrained_row_of_a_large_table_is_found(rows, cast):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(20_000, 8), torch.nn.Linear(8, 2))
    before = fingerprint(model)
    with torch.no_grad():
        model[0].weight[rows] = torch.randn(len(rows), 8) + 1
        model.to(cast)
    assert difference(model, before, fingerprint(model), ()) == "the values of '0.weight' differ"


@pytest.mark.parametrize("made_for", ["org/base-7B", "/models/base-7b/", "C:\\models\\Base-7B", "org/other"])
def test_without_a_fingerprint_the_names_are_compared(made_for, tmp_path, recwarn):
    import warnings

    folder = tmp_path / "a"
    rl.save(adapted(), folder)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": made_for}))
    model = net()
    model.name_or_path = "someone/base-7b"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        rl.load(model, folder)
    said = [str(w.message) for w in told if "base model" in str(w.message) or "which weights" in str(w.message)]
    assert bool(said) == (made_for == "org/other")
    if said:
        assert "'org/other', and this one is 'someone/base-7b'" in said[0]
    other = net()
    other.name_or_path = "someone/base-7b"
    with pytest.raises(FileError, match="unknown_base='warn'"):
        rl.load(other, folder, unknown_base="refuse")
