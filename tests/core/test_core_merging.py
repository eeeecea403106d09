"""Merging, folding, and taking adapters off again."""

import pytest
import torch
from core_tiny import adapted, assert_untouched, difference, snapshot, tower, words
from core_tiny import ids as tensor_ids

import rankloom as rl
from rankloom.errors import NotMergeable, StateError

IDS = words()


@torch.no_grad()
def test_merging_several_with_weights_is_the_sum():
    model, bank = adapted("a", "b")
    base = {k: v.clone() for k, v in tower().state_dict().items()}
    changes = {n: bank.delta(n) for n in ("a", "b")}
    bank.use(a=0.7, b=-0.2)
    out = model(IDS)
    bank.merge()
    assert difference(model(IDS), out) < 1e-12
    for site in changes["a"]:
        total = 0.7 * changes["a"][site] - 0.2 * changes["b"][site]
        total = total.T if site == "embed" else total
        torch.testing.assert_close(model.get_submodule(site).weight, base[f"{site}.weight"] + total)
    bank.unmerge()
    bank.merge("a", b=0.5)
    assert bank.merged == ("a", "b")
    bank.unmerge()
    assert torch.equal(model(IDS), out)


@torch.no_grad()
def test_every_change_is_computed_before_any_is_written():
    """DoRA's matrix depends on the base: folding two must not let the second see the first."""
    model, bank = adapted("a", "b", method=rl.DoRA(rl.LoRA(r=2)), target_modules=["q_proj"])
    bank.use("a", "b")
    out = model(IDS)
    bank.merge()
    assert difference(model(IDS), out) < 1e-12


@torch.no_grad()
def test_fold_and_fold_back():
    model, bank = adapted("a")
    out = model(IDS)
    bank.fold("a")
    with bank.using():
        assert difference(model(IDS), out) < 1e-12
    bank.fold("a", sign=-1)
    assert difference(model(IDS), out) < 1e-12
    bank.fold("a")
    bank.reset("a")
    assert difference(model(IDS), out) < 1e-12


def test_what_cannot_be_merged_is_refused_before_anything_is_written():
    model = tower()
    rl.attach(model, rl.LoRA(r=2), "a", target_modules=["q_proj"])
    bank = rl.attach(model, rl.hydralora(r=2, n_b=2), "b", target_modules=["v_proj"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept = tensor_ids(model)
    for call in (bank.merge, bank.fold):
        with pytest.raises(NotMergeable, match="depends on its input"):
            call("a", "b")
    assert tensor_ids(model) == kept
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert bank.merged == ()


def test_detach_while_merged_restores_exactly():
    model = tower()
    before = snapshot(model)
    adapted("a", "b", model=model)
    model.rankloom.merge("a", "b")
    rl.detach(model)
    assert_untouched(model, before)


@torch.no_grad()
def test_removing_one_of_two():
    model, bank = adapted("a", "b")
    bank.use("b")
    out = model(IDS)
    bank.use("a", "b")
    rl.detach(model, "a")
    assert bank.names == ("b",)
    assert bank.active == {"b": 1.0}
    assert torch.equal(model(IDS), out)
    assert not any(".a." in key for key in model.state_dict())
    rl.detach(model, "b")
    with pytest.raises(StateError, match="has no adapters"):
        rl.detach(model)


@torch.no_grad()
def test_removing_one_while_the_other_is_merged():
    model, bank = adapted("a", "b")
    bank.use("a", "b")
    with bank.using("a"):
        out = model(IDS)
    bank.merge("a")
    rl.detach(model, "b")
    assert bank.merged == ("a",)
    assert difference(model(IDS), out) < 1e-12
    bank.unmerge()
    assert bank.active == {"a": 1.0}
    assert list(bank.trainable())


def test_flags_of_gradients_are_restored():
    model = tower()
    model.embed.weight.requires_grad_(False)
    model.layers[0].q_proj.bias.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    adapted("a", model=model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
    adapted("b", model=model)
    model.rankloom.merge("a")
    rl.detach(model, "a")
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
    rl.detach(model, "b")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_selecting_while_merged_is_refused():
    model, bank = adapted("a", "b")
    bank.merge("a")
    for call in (
        lambda: bank.use("b"),
        lambda: bank.using("b").__enter__(),
        lambda: bank.merge("b"),
        lambda: bank.fold("b"),
        lambda: rl.attach(model, rl.LoRA(r=2), "c", target_modules=["q_proj"]),
    ):
        with pytest.raises(StateError, match=r"'a' is merged into the base; unmerge\(\)"):
            call()
    bank.unmerge()
    with pytest.raises(StateError, match="nothing is merged"):
        bank.unmerge()


@torch.no_grad()
def test_merging_inside_a_using_block_does_not_speak_twice():
    model, bank = adapted("a", "b")
    with bank.using("b"):
        out = model(IDS)
        bank.merge()
        assert bank.merged == ("b",)
        assert difference(model(IDS), out) < 1e-12
    assert difference(model(IDS), out) < 1e-12
    bank.unmerge()
    assert bank.active == {"a": 1.0}


def test_merging_rows_is_refused():
    _, bank = adapted("a", "b")
    for selection in ({"rows": ["a", "b"]}, {"a": torch.tensor([0.5, 0.1])}):
        bank.use(**selection)
        with pytest.raises(rl.RankloomError, match="row by row"):
            bank.merge()
    bank.use()
    with pytest.raises(StateError, match="no adapter is active"):
        bank.merge()
