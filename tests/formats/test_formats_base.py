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
