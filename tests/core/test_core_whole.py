"""Tensors trained whole: modules_to_save, biases, single token rows, tied heads."""

import copy
import warnings

import pytest
import torch
from core_tiny import assert_lives, assert_untouched, difference, llama, nudge, snapshot, tokens, tower, words
from torch import nn

import rankloom as rl

D = torch.float64
IDS = words()


class Net(nn.Module):
    """Layers with running statistics, norms, a nested head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.bn = nn.BatchNorm1d(6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return self.head(self.norm(self.bn(self.body(x))))


def net(dtype=D):
    torch.manual_seed(0)
    return Net().to(dtype).eval()


X = torch.randn(8, 4, dtype=D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("saved", [["head"], ["norm"], ["bn"], ["head.2"], ["norm", "head", "bn"]], ids=str)
def test_modules_to_save(saved):
    assert_lives(net(), lambda m: m(X), rl.LoRA(r=2), target_modules=["body"], modules_to_save=saved)


def test_modules_to_save_own_every_tensor_inside_and_only_those():
    bank = rl.attach(net(), rl.LoRA(r=2), target_modules=["body"], modules_to_save=["head", "bn"])
    assert [f.name for f in bank.sites("default")] == [
        "body", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
        "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias",
    ]  # fmt: skip
    trained = {key.split("/")[1] for key, *_ in bank.trainable()}
    assert trained == {
        "body:A", "body:B", "bn.weight:value", "bn.bias:value",
        *(f"head.{i}.{k}:value" for i in (0, 2) for k in ("weight", "bias")),
    }  # fmt: skip


def test_training_a_saved_module_is_training_the_module():
    model, plain = net().train(), net().train()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["body"], modules_to_save=["head", "bn", "norm"])
    for p in plain.body.parameters():
        p.requires_grad_(False)
    mine = [p for key, p, _ in bank.trainable() if "body" not in key]
    theirs = [p for p in plain.parameters() if p.requires_grad]
    assert len(mine) == len(theirs) == 8
    for parameters, one in ((mine, model), (theirs, plain)):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            one(X).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(X), plain(X))
    statistics = dict(bank.adapters())
    assert torch.equal(statistics["bn.num_batches_tracked"].value, plain.bn.num_batches_tracked)
    base = net()
    assert torch.equal(model.bn._buffers["running_mean"], base.bn.running_mean), "the base's statistics moved"
    assert torch.equal(model.head[0]._parameters["weight"], base.head[0].weight)
    rl.detach(model)
    assert torch.equal(model.eval()(X), base(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("override", [None, "float32"])
def test_running_statistics_move_in_any_dtype(dtype, override):
    model = net(dtype).train()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["body"], modules_to_save=["bn"], dtype=override)
    held = dict(bank.adapters())
    before = held["bn.running_mean"].value.clone()
    model(X.to(dtype))
    assert held["bn.num_batches_tracked"].value.item() == 1
    assert held["bn.num_batches_tracked"].value.dtype == torch.int64
    assert not torch.equal(held["bn.running_mean"].value, before)
    assert model.bn._buffers["num_batches_tracked"].item() == 0


def test_half_precision_modules_are_trained_in_float32():
    model = net(torch.bfloat16)
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["body"], modules_to_save=["head"])
    assert {p.dtype for _, p, _ in bank.trainable()} == {torch.float32}
    assert model(X.bfloat16()).dtype == torch.bfloat16


def test_two_adapters_hold_two_heads():
    model = net()
    base = model(X).detach()
    for seed, name in enumerate(("a", "b")):
        bank = rl.attach(model, rl.LoRA(r=2), name, target_modules=["body"], modules_to_save=["head"])
        nudge(bank, name, seed=seed)
    heads = {n: dict(bank.adapters(n))["head.2.bias"].value for n in ("a", "b")}
    for name in ("a", "b"):
        with bank.using(name):
            assert torch.equal(model.head[2].bias, heads[name])
    with bank.using():
        assert torch.equal(model(X), base)
    with bank.using("a", "b"):
        torch.testing.assert_close(model.head[2].bias, heads["a"] + heads["b"] - model.head[2]._parameters["bias"])


def test_a_fold_copies_so_that_later_training_leaves_the_base_alone():
    model = net()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["body"], modules_to_save=["head"])
    nudge(bank)
    out = model(X).detach()
    bank.fold("default")
    bank.use()
    torch.testing.assert_close(model(X), out)
    nudge(bank, seed=5)
    torch.testing.assert_close(model(X), out)


# biases -------------------------------------------------------------------------------------------------------------


def bias_names(bank):
    return {f.name for f in bank.sites("default") if f.bare}


def test_bias_all_and_lora_only_are_the_parameters_that_peft_trains():
    from peft import LoraConfig, get_peft_model

    def make():
        model = net()
        model.attn = nn.MultiheadAttention(4, 2)
        return model

    for bias in ("none", "lora_only", "all"):
        theirs = get_peft_model(make(), LoraConfig(r=2, target_modules=["body"], bias=bias))
        expected = {
            n.removeprefix("base_model.model.").replace("base_layer.", "")
            for n, p in theirs.named_parameters()
            if p.requires_grad and "lora_" not in n
        }
        bank = rl.attach(make(), rl.LoRA(r=2), target_modules=["body"], bias=bias)
        assert bias_names(bank) == expected, bias


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("method", [rl.LoRA(r=2), rl.LoRA(r=2, lora_bias=True), rl.DoRA(rl.LoRA(r=2))], ids=str)
def test_bias_lives(bias, method):
    assert_lives(net(), lambda m: m(X), method, target_modules=["body"], bias=bias)


def test_a_layer_and_its_own_weight_in_two_adapters_merge_to_their_sum():
    model = net()
    nudge(rl.attach(model, rl.LoRA(r=2, lora_bias=True), "a", target_modules=["body"]), "a")
    bank = rl.attach(model, rl.LoRA(r=2), "b", target_modules=["head.0"], modules_to_save=["body"])
    nudge(bank, "b", seed=3)
    bank.use(a=0.5, b=0.25)
    out = model(X).detach()
    bank.merge()
    torch.testing.assert_close(model(X), out)
    bank.unmerge()
    assert torch.equal(model(X), out)


# token rows ---------------------------------------------------------------------------------------------------------

FORMS = {"list": [2, 5], "dict": {"embed": [2, 5]}}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed"], ["q_proj", "head"], ["embed", "head"]], ids=str)
def test_token_rows(form, tied, targets):
    ids = torch.tensor([[2, 3, 5], [0, 2, 2]])
    assert_lives(tower(tied=tied), lambda m: m(ids), rl.LoRA(r=2), target_modules=targets, trainable_token_indices=form)


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_equal_the_written_table(tied):
    model, plain = tower(tied=tied), tower(tied=tied)
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"], trainable_token_indices=[7, 2])
    rows = bank.shared_of("default").tensor("token_rows__embed")
    assert torch.equal(rows, plain.embed.weight[[7, 2]])
    rows.data += 1
    plain.embed.weight.data[[7, 2]] += 1
    torch.testing.assert_close(model(IDS), plain(IDS))


def test_only_the_chosen_rows_are_trained():
    model = tower(tied=True)
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"], trainable_token_indices=[2, 5])
    ((key, rows, role),) = [t for t in bank.trainable() if "shared" in t[0]]
    assert key == "default/shared:token_rows__embed"
    assert role == "whole"
    assert rows.shape == (2, 8)
    model(torch.tensor([[2, 1]])).sum().backward()
    assert (rows.grad.abs().amax(1) > 0).all(), "the head's rows have a gradient though token 5 was not read"


def test_token_rows_of_a_scaled_embedding_keep_the_scale():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = Gemma3TextScaledWordEmbedding(7, 4, 0, embed_scale=3.0)
            self.q = nn.Linear(4, 4)

        def forward(self, ids):
            return self.q(self.embed(ids))

    ids = torch.tensor([[0, 2, 3]])
    model = Scaled().double()
    plan = {"target_modules": ["q", "embed"], "trainable_token_indices": {"embed": [2, 0]}}
    assert_lives(model, lambda m: m(ids), rl.LoRA(r=2), **plan)
    plain = copy.deepcopy(model)
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q"], trainable_token_indices={"embed": [2]})
    bank.shared_of("default").tensor("token_rows__embed").data += 1
    plain.embed.weight.data[2] += 1
    torch.testing.assert_close(model(ids), plain(ids))


@pytest.mark.parametrize("tied", [False, True])
def test_token_rows_and_lora_agree_with_peft(tied):
    from peft import LoraConfig, get_peft_model

    ids = tokens()
    ids[0, :2] = torch.tensor([4, 9])
    base = llama(tie_word_embeddings=tied)
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[4, 9])
    )
    model = copy.deepcopy(base)
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"], trainable_token_indices=[4, 9])
    rows = torch.randn(2, 16, dtype=D)
    bank.shared_of("default").tensor("token_rows__model__embed_tokens").data.copy_(rows)
    mine = dict(bank.adapters())
    for name, module in theirs.named_modules():
        if hasattr(module, "trainable_tokens_delta") and "default" in module.trainable_tokens_delta:
            module.trainable_tokens_delta["default"].data.copy_(rows)
        elif hasattr(module, "lora_A") and "default" in module.lora_A:
            site = mine[name.removeprefix("base_model.model.")]
            site.B.data.normal_()
            module.lora_A["default"].weight.data.copy_(site.A)
            module.lora_B["default"].weight.data.copy_(site.B)
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-6, atol=1e-6)


# tied heads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed", "head"])
def test_merging_one_of_two_tied_layers_leaves_the_other(target):
    """PEFT writes into the shared tensor, so the head changes with the embedding; here merged equals unmerged."""
    model = tower(tied=True)
    shared = model.embed.weight
    assert_lives(model, lambda m: m(IDS), rl.LoRA(r=2), target_modules=[target])
    assert model.embed.weight is shared
    assert model.head.weight is shared
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=[target])
    nudge(bank)
    bank.merge()
    other = model.head if target == "embed" else model.embed
    assert other.weight is shared
    rl.detach(model)
    assert model.embed.weight is model.head.weight is shared


def test_training_one_of_two_tied_tensors_whole_warns():
    with pytest.warns(UserWarning, match=r"'embed.weight' is trained whole but tied to 'head.weight'"):
        rl.attach(tower(tied=True), rl.LoRA(r=2), target_modules=["q_proj"], modules_to_save=["embed"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rl.attach(tower(tied=False), rl.LoRA(r=2), target_modules=["q_proj"], modules_to_save=["embed"])


# deeper models ------------------------------------------------------------------------------------------------------


def replicated_with_peft(ranges):
    from peft import LoraConfig, get_peft_model

    base = llama(depth=3)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], layer_replication=ranges)
    theirs = get_peft_model(copy.deepcopy(base), config)
    bank = rl.attach(base, rl.LoRA(r=2, lora_alpha=4), target_modules=["q_proj", "up_proj"], layer_replication=ranges)
    nudge(bank)
    layers = dict(theirs.named_modules())
    for site, adapter in bank.adapters():
        layer = layers[f"base_model.model.{site}"]
        layer.lora_A["default"].weight.data.copy_(adapter.A)
        layer.lora_B["default"].weight.data.copy_(adapter.B)
    return base, theirs, bank


@pytest.mark.parametrize("ranges", [[[0, 2], [1, 3]], [[0, 3], [0, 3]], [[2, 3], [0, 1]]], ids=str)
def test_layer_replication_agrees_with_peft(ranges):
    ids = tokens()
    model, theirs, bank = replicated_with_peft(ranges)
    depth = sum(b - a for a, b in ranges)
    assert len(bank.sites("default")) == 2 * depth
    assert model.config.num_hidden_layers == depth
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-8, atol=1e-8)


def test_a_replicated_model_generates_with_its_cache():
    ids = tokens()
    model, *_ = replicated_with_peft([[0, 2], [1, 3]])
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


def test_layer_replication_is_undone_exactly():
    ids = tokens()
    model = llama(depth=3)
    before, out, config = snapshot(model), model(ids).logits, model.config.to_dict()
    parameters = sum(p.numel() for p in model.parameters())
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"], layer_replication=[(0, 3), (1, 3)])
    assert sum(p.numel() for n, p in model.named_parameters() if "adapters" not in n) == parameters, (
        "weights are shared"
    )
    assert model.model.layers[3].self_attn.config is model.config
    assert len({layer.self_attn.layer_idx for layer in model.model.layers}) == 5
    nudge(bank)
    bank.merge()
    rl.detach(model)
    assert_untouched(model, before)
    assert model.config.to_dict() == config
    assert torch.equal(model(ids).logits, out)


def test_layer_types_follow_the_replication():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    types = list(config.layer_types)
    assert len(set(types)) == 2
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)])
    nudge(bank)
    ids = tokens(length=8)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.config.layer_types == types * 2
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))
    rl.detach(model)
    assert model.config.layer_types == types


def test_a_second_adapter_on_a_deeper_model():
    model = llama(depth=2)
    before = snapshot(model)
    rl.attach(model, rl.LoRA(r=2), "deep", target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)])
    bank = rl.attach(model, rl.LoRA(r=2), "more", target_modules=["q_proj"])
    assert len(bank.sites("more")) == 4
    with pytest.raises(rl.RankloomError, match="made the model deeper; detach 'more'"):
        rl.detach(model, "deep")
    with pytest.raises(rl.RankloomError, match="first adapter"):
        rl.attach(model, rl.LoRA(r=2), "x", target_modules=["q_proj"], layer_replication=[(0, 2)])
    rl.detach(model)
    assert_untouched(model, before)


def test_layer_replication_needs_one_list_of_blocks():
    with pytest.raises(rl.RankloomError, match="one list of blocks"):
        rl.attach(net(), rl.LoRA(r=2), target_modules=["body"], layer_replication=[(0, 1)])


def test_difference_of_the_helper_is_relative():
    assert difference(torch.tensor([2.0, 4.0]), torch.tensor([2.0, 2.0])) == 1.0
