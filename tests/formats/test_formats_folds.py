"""A base that was folded into: its adapter's folder names the original base and brings it there again."""

from __future__ import annotations

import json

import pytest
import torch
from formats_tiny import X, adapted, config, edit_config, edit_tensors, net, shake
from safetensors.torch import load_file

import rankloom as rl
from rankloom.core.fingerprint import fingerprint
from rankloom.core.targets import base_tensors
from rankloom.errors import FileError, NotMergeable, StateError
from rankloom.formats import export, load_state, state
from rankloom.store.base import Packed, dense
from rankloom.store.normalfloat import NormalFloat


def base_of(model):
    return {f"{p}.{k}": dense(t) for p, _, k, t in base_tensors(model)}


def folded(method=None, folds=2, **plan):
    """An adapter that was restarted, and is not zero."""
    model = adapted(method, **plan)
    for seed in range(folds):
        model.rankloom.restart("default")
        generator = torch.Generator().manual_seed(seed)
        for _, p, _ in model.rankloom.trainable("default"):
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(base_of(a).values(), base_of(b).values()))


@pytest.mark.parametrize("method", [rl.LoRA(r=2, lora_alpha=5.0), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=3)], ids=str)
def test_the_original_base_is_folded_again_on_loading(method, tmp_path):
    model = folded(method, bias="lora_only", modules_to_save=["score"])
    report = rl.save(model, tmp_path / "a")
    assert report.format == "rankloom"
    assert "folded into the base" in str(report.compat)
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["base"] == fingerprint(net())
    other = net()
    bank = rl.load(other, tmp_path / "a")
    assert same(other, model)
    assert torch.equal(other(X), model(X))
    assert len(bank.journal) == 2
    rl.save(other, tmp_path / "b")
    again = net()
    rl.load(again, tmp_path / "b")
    assert torch.equal(again(X), model(X))


def test_a_base_that_has_the_folds_already_is_known(tmp_path):
    model = folded()
    rl.save(model, tmp_path / "a")
    said = model(X)
    rl.detach(model)
    bank = rl.load(model, tmp_path / "a")
    assert torch.equal(model(X), said)
    assert not len(bank.journal)
    rl.save(model, tmp_path / "b")
    with pytest.raises(FileError, match="made on another base"):
        rl.load(net(), tmp_path / "b")


def test_another_base_is_refused(tmp_path):
    rl.save(folded(), tmp_path / "a")
    for other in (net(seed=6), folded(folds=1)):
        name = "b"
        before = {k: v.clone() for k, v in base_of(other).items()}
        with pytest.raises((FileError, StateError), match=r"another base|folds of its own"):
            rl.load(other, tmp_path / "a", name)
        assert all(torch.equal(v, before[k]) for k, v in base_of(other).items())
    rl.save(adapted(), tmp_path / "plain")
    with pytest.raises(FileError, match="made on another base"):
        rl.load(folded(), tmp_path / "plain", "b")


def test_folds_do_not_slip_under_adapters_that_are_there(tmp_path):
    rl.save(folded(), tmp_path / "a")
    model = adapted()
    said = model(X)
    with pytest.raises(StateError, match="2 folds of its own, which would change the base of 'default'"):
        rl.load(model, tmp_path / "a", "b")
    assert torch.equal(model(X), said)
    assert model.rankloom.names == ("default",)


def test_two_adapters_of_one_folded_base_come_back_together(tmp_path):
    model = folded()
    rl.attach(model, rl.LoRA(r=1), "b", target_modules=["q"])
    shake(model.rankloom, "b")
    for name in ("default", "b"):
        rl.save(model, tmp_path / name, name)
    other = net()
    rl.load(other, tmp_path / "default")
    rl.load(other, tmp_path / "b", "b")
    for name in ("default", "b"):
        with model.rankloom.using(name), other.rankloom.using(name):
            assert torch.equal(other(X), model(X))


def test_a_packed_base_is_packed_and_folded_again(tmp_path):
    model = folded(store=NormalFloat(4, block=8))
    rl.save(model, tmp_path / "a")
    other = net()
    rl.load(other, tmp_path / "a")
    assert isinstance(other.layers[0].q.weight, Packed)
    assert torch.equal(other(X), model(X))


def broken_config(**changes):
    def edit(folder):
        journal = {**config(folder)["journal"], **changes}
        edit_config(folder, journal=journal)

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (broken_config(folds=[0, 7]), "no journal of folds"),
        (broken_config(folds=[-1]), "no journal of folds"),
        (broken_config(rows=[{"into": "store"}]), "no journal of folds"),
        (broken_config(after={}), "no fingerprint"),
        (lambda f: edit_config(f, journal=3), "no journal of folds"),
        (lambda f: edit_config(f, journal=...), "belongs to nothing"),
        (lambda f: edit_tensors(f, **{"journal:1.0.0.A": ...}), "journal:1.0.0.A' of the journal is missing"),
        (lambda f: edit_tensors(f, **{"journal:1.0.0.B": lambda t: t[:-1]}), "has shape"),
        (lambda f: edit_tensors(f, **{"journal:1.0.0.B": lambda t: t * torch.nan}), "NaN"),
    ],
)
def test_a_broken_journal_is_refused_and_the_model_is_as_before(edit, words, tmp_path):
    rl.save(folded(), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    edit(tmp_path / "a")
    model = net()
    before = {k: v.clone() for k, v in base_of(model).items()}
    with (
        pytest.warns(UserWarning, match="nothing says") if "NaN" in words else _nothing(),
        pytest.raises(FileError, match=words),
    ):
        rl.load(model, tmp_path / "a")
    assert not hasattr(model, "rankloom")
    assert all(torch.equal(v, before[k]) for k, v in base_of(model).items())


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_a_site_that_the_model_has_not_is_refused_by_name(tmp_path):
    rl.save(folded(), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    journal = config(tmp_path / "a")["journal"]
    journal["rows"][0]["edits"][0]["path"] = "layers.7.q"
    edit_config(tmp_path / "a", journal=journal)
    with pytest.raises(FileError, match=r"changes 'layers\.7\.q', which this model has not"):
        rl.load(net(), tmp_path / "a")


# export -------------------------------------------------------------------------------------------------------------


def test_the_total_is_one_lora_on_the_original_base(tmp_path):
    model = folded(rl.LoRA(r=2, lora_alpha=3.0), folds=3, bias="lora_only", modules_to_save=["score"])
    report = export(model, tmp_path / "a")
    assert report.error == 0
    assert config(tmp_path / "a")["r"] == 8
    assert (report.saved.format, report.saved.peft_type) == ("peft", "LORA")
    other = net()
    rl.load(other, tmp_path / "a")
    torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-5)
    total = {at: base_of(model)[f"{at}.weight"] - base_of(net())[f"{at}.weight"] for at in report.errors}
    for at, change in model.rankloom.delta("default").items():
        if at in total:
            torch.testing.assert_close(other.rankloom.delta("default")[at], total[at] + change, atol=1e-5, rtol=1e-4)
    assert model.rankloom.names == ("default",)
    assert len(model.rankloom.journal) == 3


def test_cut_down_it_states_what_is_lost(tmp_path):
    model = folded(rl.LoRA(r=2), folds=2)
    bases = {
        at: base_of(model)[f"{at}.weight"] - base_of(net())[f"{at}.weight"] for at in model.rankloom.adapted("default")
    }
    report = export(model, tmp_path / "a", r=3)
    assert config(tmp_path / "a")["r"] == 3
    for at, change in model.rankloom.delta("default").items():
        s = torch.linalg.svdvals(bases[at] + change)
        assert report.errors[at] == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-3)
    assert report.error > 0.01


def test_dense_changes_and_biases_are_in_the_total_too(tmp_path):
    for method in (rl.DoRA(rl.LoRA(r=2)), rl.LoRA(r=2, lora_bias=True)):
        model = folded(method)
        report = export(model, tmp_path / "a", r=8)
        assert report.error < 1e-5
        other = net()
        rl.load(other, tmp_path / "a")
        torch.testing.assert_close(other(X), model(X), rtol=1e-4, atol=1e-4)


def test_sites_that_only_the_journal_has_are_in_the_total(tmp_path):
    model = folded()
    rl.attach(model, rl.LoRA(r=1), "b", target_modules=["score"])
    shake(model.rankloom, "b")
    model.rankloom.use("b")
    report = export(model, tmp_path / "a", "b")
    assert set(report.errors) == {"score", *model.rankloom.adapted("default")}
    other = net()
    rl.load(other, tmp_path / "a")
    torch.testing.assert_close(other(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_whole_tensor_in_the_base_is_no_lora(tmp_path):
    model = adapted(modules_to_save=["score"])
    model.rankloom.fold("default")
    rl.attach(model, rl.LoRA(r=1), "b", target_modules=["q"])
    with pytest.raises(NotMergeable, match=r"'score.weight' was trained whole and folded"):
        export(model, tmp_path / "a", "b")
    assert model.rankloom.names == ("default", "b")
    assert not (tmp_path / "a").exists()


# PEFT's keys in memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "plan"),
    [
        (rl.LoRA(r=2), {"modules_to_save": ["score"], "bias": "lora_only"}),
        (rl.DoRA(rl.LoRA(r=2)), {}),
        (rl.VeRA(r=3), {}),
        (rl.AdaLoRA(init_r=3, target_r=2), {}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_peft_keys_there_and_back(method, plan, tmp_path):
    model = adapted(method, **plan)
    said, found = model(X), state(model)
    rl.save(model, tmp_path / "a")
    assert found.keys() == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    shake(model.rankloom)
    assert not torch.equal(model(X), said)
    load_state(model, found)
    assert torch.equal(model(X), said)
    key = next(iter(found))
    for wrong, words in (
        ({k: v for k, v in found.items() if k != key}, "no tensor"),
        ({**found, "odd": found[key]}, "has no tensor 'odd'"),
        ({**found, key: found[key][..., :1]}, "has shape"),
    ):
        with pytest.raises(StateError, match=words):
            load_state(model, wrong)
    assert torch.equal(model(X), said)
    assert json.dumps(sorted(found))
