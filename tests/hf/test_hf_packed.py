"""Packed models as folders, runs on them, and merges: file by file, into 16 bits or into the store."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import rankloom as rl
from rankloom import microworld
from rankloom.core.plan import Plan
from rankloom.errors import FileError, SettingsError, StateError
from rankloom.hf.models import ModelSettings, load_model, skeleton
from rankloom.hf.packed import save_packed
from rankloom.hf.shards import Shards, write_shards
from rankloom.jobs.merge import merge_job
from rankloom.jobs.plan import plan_job
from rankloom.jobs.quantize import quantize_job
from rankloom.jobs.runs import eval_job, train_job
from rankloom.store.base import Packed
from rankloom.train.config import from_data

IDS = torch.arange(40).reshape(2, 20) + 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of two layers with the embedded world's tokenizer, in bfloat16 files."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1280,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(microworld.base_path()).save_pretrained(folder)
    return folder


def config_of(base, out=None, **plan):
    return from_data(
        {
            "model": {"path": str(base)},
            "data": {"source": "microworld:list_rotate#64", "eval_examples": 8, "eval_answers": 0},
            "plan": {"method": "lora", **plan},
            "train": {"steps": 3, "lr": 0.01},
            **({"out": str(out)} if out is not None else {}),
        }
    )


def adapted(base, folder, plan, name="default", **settings):
    """An adapter on the base, moved from its start, saved: its model and folder."""
    model = load_model(ModelSettings(str(base))).model
    bank = rl.attach(model, plan, name, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter, _ in bank.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    rl.save(model, folder, name)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_packed_model_comes_back_bit_for_bit(base, tmp_path):
    loaded = load_model(ModelSettings(str(base)))
    rl.attach(loaded.model, rl.qlora(bits=3, r=4))
    rl.detach(loaded.model)
    save_packed(loaded.model, loaded.tokenizer, tmp_path)
    again = load_model(ModelSettings(str(tmp_path)))
    assert torch.equal(logits(again.model), logits(loaded.model))
    assert again.notes == ()
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight
    assert isinstance(again.model.model.layers[1].mlp.up_proj.weight, Packed)
    bare = skeleton(ModelSettings(str(tmp_path))).model
    assert bare.model.layers[0].mlp.up_proj.weight.store == again.model.model.layers[0].mlp.up_proj.weight.store
    assert all(p.is_meta for p in bare.parameters())


def test_other_libraries_refuse_a_packed_folder(base, tmp_path):
    from transformers import AutoModelForCausalLM

    quantize_job(config_of(base, store="normal_float"), tmp_path / "q")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


@pytest.mark.parametrize("damage", ["part", "shape", "file"])
def test_a_damaged_packed_folder_is_refused_by_name(base, tmp_path, damage):
    from safetensors.torch import save_file

    quantize_job(config_of(base, store="normal_float"), tmp_path / "q")
    path = tmp_path / "q" / "packed.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    key = "model.layers.0.mlp.up_proj.weight.codes"
    if damage == "part":
        del tensors[key]
    elif damage == "shape":
        tensors[key] = tensors[key][:-2].clone()
    save_file(tensors, path, metadata=about)
    if damage == "file":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="up_proj" if damage != "file" else "packed.safetensors"):
        load_model(ModelSettings(str(tmp_path / "q")))


def test_quantize_reports_bytes_and_error(base, tmp_path):
    found = quantize_job(config_of(base, store={"name": "normal_float", "bits": 4}), tmp_path / "q")
    kept = {k.how: k for k in found.kept}
    assert kept[str(rl.NormalFloat(4))].tensors == 14
    assert kept[str(rl.NormalFloat(4))].bits_per_weight == pytest.approx(4.13, abs=0.05)
    assert 0 < found.error.relative < 0.3
    assert found.adapter is None
    with pytest.raises(SettingsError, match="the plan has no store"):
        quantize_job(config_of(base), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_quantize_with_a_start_saves_its_adapter_inside(base, tmp_path):
    plain = quantize_job(config_of(base, store={"name": "normal_float", "bits": 2}), tmp_path / "plain")
    found = quantize_job(
        config_of(base, method={"name": "lqer", "bits": 2, "r": 16, "activations": True}), tmp_path / "q"
    )
    assert found.error.relative < plain.error.relative
    model = load_model(ModelSettings(str(tmp_path / "q"))).model
    rl.load(model, found.adapter)
    assert json.loads((found.adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "q"
    )
    assert len(found.splits) == 14


def test_a_run_with_a_split_base_keeps_it_and_is_judged_on_it(base, tmp_path):
    config = config_of(base, tmp_path / "run", method={"name": "loftq", "bits": 2, "r": 4})
    result = train_job(config, report=lambda row: None).result
    assert (tmp_path / "run" / "base" / "packed.safetensors").is_file()
    judged = eval_job(config, result.adapter)
    assert judged["adapter"]["loss"] == pytest.approx(result.after["loss"], rel=1e-5)
    assert judged["base"]["loss"] != pytest.approx(result.before["loss"], rel=1e-3)


def test_a_run_with_a_split_base_resumes_exactly(base, tmp_path):
    losses = {}
    for name in ("whole", "parted"):
        config = config_of(base, tmp_path / name, method={"name": "loftq", "bits": 2, "r": 4})
        if name == "parted":
            import dataclasses

            short = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=1))
            with pytest.raises(RuntimeError, match="stopped"):
                train_job(short, report=_stop_at(2))
            config = short
        else:
            import dataclasses

            config = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=1))
        train_job(config, resume="auto" if name == "parted" else False, report=lambda row: None)
        losses[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    assert losses["whole"].keys() == losses["parted"].keys()
    assert all(torch.equal(losses["whole"][k], losses["parted"][k]) for k in losses["whole"])


def _stop_at(step):
    def told(row):
        if row.get("event") == "save" and row["step"] == step:
            raise RuntimeError("stopped")

    return told


def test_plan_counts_the_packed_weights_and_shows_other_stores(base):
    dense = plan_job(config_of(base))
    packed = plan_job(config_of(base, method={"name": "qlora", "r": 4}))
    assert dense.memory.weights == sum(k.bytes for k in dense.weights)
    assert {k.how for k in packed.weights} == {str(rl.NormalFloat(4)), "float32"}
    four = next(s for s in dense.stores if s.store == str(rl.NormalFloat(4)))
    assert four.bytes == pytest.approx(packed.memory.weights, rel=0.01)
    assert packed.memory.activations
    assert packed.trainable == plan_job(config_of(base, method={"name": "lora", "r": 4})).trainable


# ---- merges ---------------------------------------------------------------------------------------------------------


def merged_model(folder):
    return load_model(ModelSettings(str(folder))).model


@pytest.mark.parametrize(
    "plan", [rl.LoRA(r=4), rl.DoRA(rl.LoRA(r=4)), rl.LoRA(r=4, init_lora_weights="pissa")], ids=str
)
def test_merging_file_by_file_equals_merging_in_memory(base, tmp_path, plan):
    model = adapted(base, tmp_path / "a", plan, target_modules=["q_proj", "down_proj"])
    found = merge_job(config_of(base), tmp_path / "a", tmp_path / "m")
    assert found.how.startswith("file by file")
    model.rankloom.merge("default")
    for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        want = model.get_parameter(name)
        assert torch.allclose(tensor.float(), want.float(), rtol=2**-7, atol=1e-6), name
    assert found.error.relative < 1e-2
    assert found.change.relative > 5 * found.error.relative
    assert found.trained is None


def test_one_layer_at_a_time_is_in_memory(base, tmp_path, monkeypatch):
    """The bound of the merge: whatever the model, no more than one layer's tensors and one file's are alive."""
    adapted(base, tmp_path / "a", rl.LoRA(r=4))
    alive, most = [0], [0]

    class Counting(Shards):
        def tensor(self, name):
            found = super().tensor(name)
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            import weakref

            weakref.finalize(found.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - 1))
            return found

    monkeypatch.setattr("rankloom.jobs.merge.Shards", Counting)
    monkeypatch.setattr("rankloom.jobs.merge.write_shards", lambda f, t: write_shards(f, t, largest=1))
    found = merge_job(config_of(base), tmp_path / "a", tmp_path / "m", verify=False)
    assert found.error is None
    assert found.measured_on == "not measured"
    assert most[0] <= 4
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) == 20
    assert torch.isfinite(logits(merged_model(tmp_path / "m"))).all()


def test_a_qlora_adapter_merges_into_the_16_bit_base(base, tmp_path):
    model = adapted(base, tmp_path / "a", rl.qlora(r=4))
    found = merge_job(config_of(base), tmp_path / "a", tmp_path / "m")
    assert found.how.startswith("file by file")
    dense = load_model(ModelSettings(str(base))).model
    bank = rl.load(dense, tmp_path / "a", pack=False)
    bank.merge("default")
    got = merged_model(tmp_path / "m")
    assert (logits(got) - logits(dense)).norm() < 0.02 * logits(dense).norm()
    assert found.error.relative < 0.02
    off = (logits(got) - logits(model)).norm() / logits(model).norm()
    assert found.trained.relative > 3 * found.error.relative
    assert off > 0.02
    assert not any(isinstance(p, Packed) for p in got.parameters())


def test_a_split_base_is_merged_dense_with_its_own_codes(base, tmp_path):
    config = config_of(base, tmp_path / "run", method={"name": "loftq", "bits": 2, "r": 8})
    adapter = train_job(config, report=lambda row: None).result.adapter
    found = merge_job(config, adapter, tmp_path / "m")
    assert found.how.startswith("file by file")
    assert found.error.relative < 1e-3
    assert not any(isinstance(p, Packed) for p in merged_model(tmp_path / "m").parameters())


def test_tied_embeddings_are_merged_in_memory(base, tmp_path):
    adapted(base, tmp_path / "a", rl.LoRA(r=4), target_modules=["embed_tokens"])
    found = merge_job(config_of(base), tmp_path / "a", tmp_path / "m")
    assert found.how == "in memory: model.embed_tokens.weight is tied, or in no file under that name"
    assert found.error.relative < 1e-4


def test_into_the_store_qa_lora_loses_nothing_and_stays_packed(base, tmp_path):
    plan = Plan(rl.QALoRA(r=4, group_size=32), store=rl.Uniform(bits=4, group=32))
    model = adapted(base, tmp_path / "a", plan)
    found = merge_job(config_of(base), tmp_path / "a", tmp_path / "m", into="store")
    assert found.error.relative < 1e-5
    assert max(found.lost.values()) < 1e-5
    got = merged_model(tmp_path / "m")
    assert torch.allclose(logits(got), logits(model), atol=1e-4)
    assert sum(isinstance(p, Packed) for p in got.parameters()) == 14


def test_into_the_store_is_refused_where_rounding_eats_the_change(base, tmp_path):
    plan = Plan(rl.LoRA(r=4), store=rl.NormalFloat(bits=2))
    adapted(base, tmp_path / "a", plan, target_modules=["q_proj"])
    with pytest.raises(
        StateError, match=r"half of what the adapter itself changes.*merge into='16bit'.*Nothing was written"
    ):
        merge_job(config_of(base), tmp_path / "a", tmp_path / "m", into="store")
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.glob(".m.*"))
    found = merge_job(config_of(base), tmp_path / "a", tmp_path / "m", tolerance=10.0, into="store")
    assert found.lost
    assert found.error.relative > 0


def test_into_the_store_needs_a_packed_base(base, tmp_path):
    adapted(base, tmp_path / "a", rl.LoRA(r=4))
    with pytest.raises(StateError, match="this base is not packed"):
        merge_job(config_of(base), tmp_path / "a", tmp_path / "m", into="store")
