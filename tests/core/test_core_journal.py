"""The journal: folds are remembered as changes, done again bit for bit, and taken back if originals were kept."""

import copy
import io
import pickle

import pytest
import torch
from core_tiny import adapted, difference, nudge, tower, words
from torch import nn

import rankloom as rl
from rankloom.core.journal import Delta, Journal, Pair, Value
from rankloom.core.targets import base_tensors
from rankloom.errors import NotMergeable, SettingsError, StateError, TargetError
from rankloom.methods.lora import LoRAAdapter
from rankloom.store.base import Packed, dense
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

IDS = words()
METHODS = [rl.LoRA(r=2), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=3), rl.LoRA(r=2, init_lora_weights="pissa")]


def values(model):
    return {f"{p}.{k}": dense(t).detach().clone() for p, _, k, t in base_tensors(model)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def through_file(journal):
    from safetensors.torch import load, save

    state = journal.state()
    return Journal.of({**state, "tensors": load(save(state["tensors"]))})


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_base_is_brought_to_the_same_bits(method, dtype):
    model, bank = adapted("a", method=method, model=tower().to(dtype), bias="all", modules_to_save=["head"])
    bank.fold("a", into="dense")
    nudge(bank, "a", seed=5)
    bank.fold(a=-0.7)
    assert len(bank.journal) == 2
    other, twin = adapted("b", method=rl.LoRA(r=1), model=tower().to(dtype), target_modules=["q_proj"])
    twin.refold(through_file(bank.journal))
    assert same(values(other), values(model))
    assert not same(values(other), values(tower().to(dtype)))
    assert twin.journal.continues(bank.journal)
    assert bank.original() == twin.original() == adapted("c", model=tower().to(dtype))[1].original()


def test_thin_changes_are_kept_thin_and_whole_tensors_as_they_are():
    _, bank = adapted("a", target_modules=["q_proj"], modules_to_save=["head"], bias="lora_only")
    bank.fold("a")
    terms = {edit.name: edit.terms for edit in bank.journal.folds[0].edits}
    assert {type(t) for name, found in terms.items() for t in found if name.endswith("q_proj")} == {Pair}
    assert {type(t) for t in terms["head.weight"]} == {Value}
    _, bank = adapted("a", method=rl.DoRA(rl.LoRA(r=2)), target_modules=["q_proj"])
    bank.fold("a")
    assert {type(t) for edit in bank.journal.folds[0].edits for t in edit.terms} == {Delta}


def test_a_journal_is_a_copy_of_what_was_folded():
    model, bank = adapted("a")
    bank.fold("a")
    kept = through_file(bank.journal)
    nudge(bank, "a", seed=8)
    assert bank.journal.continues(kept)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_goes_along_with_copies(duplicate):
    model, bank = adapted("a")
    bank.fold("a")
    twin = duplicate(model)
    assert twin.rankloom.journal.continues(bank.journal)
    twin.rankloom.fold("a")
    assert (len(twin.rankloom.journal), len(bank.journal)) == (2, 1)


def test_only_what_is_beyond_its_own_is_folded_and_other_folds_are_refused():
    model, bank = adapted("a")
    bank.fold("a")
    first = through_file(bank.journal)
    bank.fold(a=0.5)
    other, twin = adapted("a")
    twin.refold(first)
    twin.refold(bank.journal)
    assert same(values(other), values(model))
    before = values(other)
    with pytest.raises(StateError, match="the base has 2 folds of its own.*load the base anew"):
        twin.refold(first)
    third, odd = adapted("a")
    odd.fold(a=0.1)
    with pytest.raises(StateError, match="1 folds of its own"):
        odd.refold(bank.journal)
    assert same(values(other), before)


def test_a_journal_of_another_model_is_refused_before_anything_is_written():
    _, bank = adapted("a", target_modules=["q_proj", "v_proj"])
    bank.fold("a")
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(3, 3)})])})
    small = rl.attach(model, rl.LoRA(r=1), target_modules=["q_proj"])
    with pytest.raises(TargetError, match=r"has shape|which this model has not"):
        small.refold(bank.journal)
    assert not len(small.journal)
    state = bank.journal.state()
    del state["folds"][0]["edits"][0]["path"]
    with pytest.raises(StateError, match="no journal of folds"):
        Journal.of(state)


def test_unfolding_puts_the_very_tensors_back():
    model, bank = adapted("a")
    bank.fold("a")
    with pytest.raises(StateError, match="keep_originals"):
        bank.unfold()
    kept = {(p, k): t for p, _, k, t in base_tensors(model)}
    out = model(IDS).detach()
    bank.keep_originals()
    bank.fold(a=0.3)
    bank.fold("a")
    later = bank.journal
    bank.unfold()
    assert len(bank.journal) == 1
    assert all(t is kept[p, k] for p, _, k, t in base_tensors(model))
    assert torch.equal(model(IDS), out)
    bank.refold(later)
    bank.refold(Journal(later.folds[:2], later.base))
    assert len(bank.journal) == 2


def test_folds_while_merged_are_refused():
    _, bank = adapted("a")
    bank.merge("a")
    for call in (lambda: bank.restart("a"), lambda: bank.refold(Journal()), bank.unfold):
        with pytest.raises(StateError, match="is merged"):
            call()


@pytest.mark.parametrize("store", [NormalFloat(4, block=16), Uniform(4, group=8)], ids=str)
def test_packed_weights_stay_packed_and_refold_to_the_same_codes(store):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))

    def packed(model):
        return rl.attach(model, rl.LoRA(r=2), store=store, target_modules=["0", "2"])

    model = make()
    bank = packed(model)
    nudge(bank)
    base, change = model[0].weight.unpack(), bank.delta("default")["0"]
    lost = bank.fold("default")
    assert isinstance(model[0].weight, Packed)
    assert lost.keys() == {"0", "2"}
    off = (dense(model[0].weight) - (base + change)).norm() / change.norm()
    assert lost["0"] == pytest.approx(float(off), rel=1e-4)
    bank.reset("default")
    nudge(bank, seed=4)
    bank.fold("default")
    other = make()
    twin = packed(other)
    twin.refold(through_file(bank.journal))
    assert isinstance(other[0].weight, Packed)
    for key, part in model[0].weight.parts.items():
        assert torch.equal(other[0].weight.parts[key], part)
    bank.fold("default", into="dense")
    assert not isinstance(model[0].weight, Packed)


def test_a_change_that_fits_its_store_is_folded_without_loss_and_again():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 24))

    def packed(model):
        return rl.attach(model, rl.QALoRA(r=2, group_size=8), store=Uniform(4, group=8), target_modules=["0"])

    model = make()
    bank = packed(model)
    nudge(bank)
    codes = {k: p.clone() for k, p in model[0].weight.parts.items()}
    assert bank.fold("default")["0"] < 1e-5
    changed = {k for k, p in model[0].weight.parts.items() if not torch.equal(p, codes[k])}
    assert changed == {"zero"} == set(bank.journal.folds[0].edits[0].parts)
    other = make()
    packed(other).refold(through_file(bank.journal))
    assert all(torch.equal(other[0].weight.parts[k], p) for k, p in model[0].weight.parts.items())


def test_detaching_says_what_stays(caplog):
    model, bank = adapted("a")
    rl.detach(model)
    assert not caplog.records
    model, bank = adapted("a", target_modules=["q_proj"])
    bank.fold("a")
    rl.detach(model)
    assert f"the base keeps what was folded into it (1 folds, {len(bank.journal.sites)} sites)" in caplog.text


def test_a_store_is_not_put_under_folds():
    model, bank = adapted("a", model=tower().float(), target_modules=["q_proj"])
    bank.fold("a")
    with pytest.raises(StateError, match="pack the base first"):
        rl.attach(model, rl.LoRA(r=1), "b", store=NormalFloat(4), target_modules=["v_proj"])
    assert bank.names == ("a",)


# restart ------------------------------------------------------------------------------------------------------------


def stepped(model, bank, name="a"):
    parameters = [p for _, p, _ in bank.trainable(name)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("method", [*METHODS, rl.AdaLoRA(init_r=3, target_r=2)], ids=str)
def test_restarting_leaves_the_function_as_it_is(method):
    model, bank = adapted("a", method=method, model=tower().float(), target_modules=["q_proj", "v_proj"])
    out = model(IDS).detach()
    bank.restart("a")
    assert difference(model(IDS), out) < 1e-6
    with bank.using():
        assert difference(model(IDS), out) < 1e-6


def test_restarting_forgets_exactly_what_starts_anew():
    model, bank = adapted("a", model=tower().float(), target_modules=["q_proj"], modules_to_save=["head"], bias="all")
    optimizer = stepped(model, bank)
    roles = {key: role for key, _, role in bank.tensors("a")}
    before = {key: p.detach().clone() for key, p, _ in bank.tensors("a")}
    kept = {key: optimizer.state[p]["exp_avg"].clone() for key, p, r in bank.tensors("a") if r == "whole"}
    out = model(IDS).detach()
    bank.restart("a", optimizer)
    assert difference(model(IDS), out) < 1e-6
    for key, p, role in bank.tensors("a"):
        if role == "whole":
            assert torch.equal(p, before[key])
            assert torch.equal(optimizer.state[p]["exp_avg"], kept[key])
        else:
            assert p not in optimizer.state
            assert not torch.equal(p, before[key])
    assert set(roles.values()) == {"in", "out", "whole"}
    assert all(site.endswith("q_proj") for site in bank.journal.sites)
    adapters = [a for _, a in bank.adapters("a", of=LoRAAdapter)]
    assert all(not a.B.any() and a.A.any() for a in adapters)


@pytest.mark.parametrize("how", ["random", "magnitude"])
@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 1.0])
def test_moments_are_pruned_by_the_part_asked_for(how, p):
    from rankloom.core.moments import Forget

    model, bank = adapted("a", model=tower().float(), target_modules=["q_proj"])
    optimizer = stepped(model, bank)
    before = {key: optimizer.state[q]["exp_avg"].clone() for key, q, _ in bank.tensors("a")}
    bank.restart("a", optimizer, moments=Forget(how, p))
    for key, q, _ in bank.tensors("a"):
        now, was = optimizer.state[q]["exp_avg"], before[key]
        gone = int((was != 0).sum() - (now != 0).sum())
        assert abs(gone - round(p * was.numel())) <= int((was == 0).sum())
        assert torch.equal(now[now != 0], was[now != 0])
        if how == "magnitude" and 0 < p < 1:
            assert was[now == 0].abs().max() <= now[now != 0].abs().min()


def test_what_cannot_be_pruned_is_refused():
    from rankloom.core.moments import Forget, forget

    with pytest.raises(SettingsError, match="from 0 to 1"):
        Forget("random", 1.5)
    with pytest.raises(SettingsError, match="'zero', 'random', 'magnitude'"):
        Forget("all")
    p = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([p], lr=1.0)
    optimizer.state[p] = {"state1": torch.zeros(4, dtype=torch.uint8)}
    with pytest.raises(SettingsError, match="few bits"):
        forget(optimizer, [p], Forget("random"))
    forget(optimizer, [p], Forget())
    assert p not in optimizer.state


def test_what_has_no_matrix_cannot_restart():
    model = tower()
    bank = rl.attach(model, rl.hydralora(r=2, n_b=2), "a", target_modules=["q_proj"])
    with pytest.raises(NotMergeable, match="depends on its input"):
        bank.restart("a")
    assert not len(bank.journal)


def test_a_file_of_a_model_holds_the_journal_of_its_bank():
    model, bank = adapted("a")
    bank.fold("a")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again.rankloom.journal.continues(bank.journal)
