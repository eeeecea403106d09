"""What loading does to the model, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from formats_tiny import X, adapted, bare, edit_config, net, saved, shake
from torch import nn

import rankloom as rl
from rankloom.errors import FileError, StateError
from rankloom.formats.base import skeleton


def test_a_loaded_adapter_speaks_and_trains(tmp_path):
    model = net()
    bank = rl.load(model, saved(tmp_path / "a"))
    assert bank.active == {"default": 1.0}
    assert torch.equal(model(X), adapted()(X))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "adapters" in n
    }
    rl.detach(model)
    assert torch.equal(model(X), net()(X))


def test_tensors_are_copied_out_of_the_file(tmp_path):
    model = net()
    bank = rl.load(model, saved(tmp_path / "a"))
    for _, parameter, _ in bank.tensors("default"):
        parameter.data.zero_()
    again = net()
    rl.load(again, tmp_path / "a")
    assert torch.equal(again(X), adapted()(X))


def test_a_merged_model_is_refused(tmp_path):
    folder = saved(tmp_path / "a")
    model = adapted()
    model.rankloom.merge("default")
    with pytest.raises(StateError, match="'default' is merged into the base; unmerge"):
        rl.load(model, folder, name="b")


def test_half_precision_bases_get_float32_adapters(tmp_path):
    folder = saved(tmp_path / "a")
    model = net().bfloat16()
    bank = rl.load(model, folder)
    assert {p.dtype for _, p, _ in bank.tensors("default")} == {torch.float32}
    again = tmp_path / "b"
    rl.save(model, again)
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_an_offloaded_model(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    folder = saved(tmp_path / "a")
    model = accelerate.cpu_offload(net(), execution_device=torch.device("cpu"))
    model = model if model is not None else pytest.skip("cpu_offload returns nothing here")
    rl.load(model, folder)
    assert model.score.weight.is_meta
    assert torch.equal(model(X), adapted()(X))


def test_the_trial_copy_has_no_numbers_and_keeps_ties():
    model = net()
    model.layers[1].q.weight = model.layers[0].q.weight
    copied = skeleton(model)
    assert all(p.is_meta for p in copied.parameters())
    assert copied.layers[1].q.weight is copied.layers[0].q.weight
    assert not any(p.is_meta for p in model.parameters())
    assert type(copied) is type(model)


def test_a_convolution_that_peft_would_compute_otherwise(tmp_path):
    def make(dilation):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv1d(2, 4, 3, padding=dilation, dilation=dilation)).eval()

    model = make(1)
    shake(rl.attach(model, rl.LoRA(r=2), target_modules=["0"]))
    rl.save(model, tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    rl.load(make(1), tmp_path / "a")
    other = make(2)
    with pytest.raises(FileError, match="PEFT ignores dilation"):
        rl.load(other, tmp_path / "a")
    assert not hasattr(other, "rankloom")


@pytest.mark.parametrize(
    ("field", "value", "change"),
    [("lora_alpha", 12, 2.0), ("use_rslora", True, 2.0)],
)
def test_fields_that_scale_the_change_do(field, value, change, tmp_path):
    folder = bare(tmp_path / "a")
    edit_config(folder, **{field: value})
    bank = rl.load(net(), folder)
    mine = adapted().rankloom.delta("default")
    assert all(torch.allclose(d, change * mine[n]) for n, d in bank.delta("default").items())
