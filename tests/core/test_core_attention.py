"""nn.MultiheadAttention, fused qkv, and the encoder layer that reads weights without calling its layers."""

import copy

import pytest
import torch
from core_tiny import assert_lives, difference, nudge
from torch import nn

import rankloom as rl

D = torch.float64
X = torch.randn(2, 5, 8, dtype=D, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, dtype=D, **settings)
        for p in self.attn.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("settings", [{"batch_first": True}, {"batch_first": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [rl.LoRA(r=2), rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=3)], ids=["lora", "dora", "vera"])
def test_attention_as_a_target(settings, training, method):
    model = Attention(**settings).train(training)
    assert_lives(model, lambda m: m(X), method, target_modules=["attn"])


def test_attention_of_different_widths():
    model = Attention(kdim=6, vdim=4, batch_first=True)
    k, v = torch.randn(2, 3, 6, dtype=D), torch.randn(2, 3, 4, dtype=D)
    run = lambda m: m.attn(X, k, v)[0]  # noqa: E731
    assert_lives(model, run, rl.LoRA(r=2), target_modules=["attn"])
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["attn"])
    assert [f.name for f in bank.sites("default")] == [
        "attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight", "attn.out_proj.weight"
    ]  # fmt: skip


def test_attention_equals_torch_with_the_written_weights():
    model = Attention(batch_first=True).eval()
    plain = copy.deepcopy(model)
    bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=4), target_modules=["attn"])
    nudge(bank)
    change = {site: 2 * (a.B @ a.A).detach() for site, a in bank.adapters()}
    plain.attn.in_proj_weight.data += change["attn.in_proj_weight"]
    plain.attn.out_proj.weight.data += change["attn.out_proj.weight"]
    torch.testing.assert_close(model(X), plain(X))
    with torch.no_grad():  # the fused eval path reads the same weights
        torch.testing.assert_close(model(X), plain(X))


def test_attention_slices_leave_the_other_rows_alone():
    model = Attention(batch_first=True)
    assert_lives(model, lambda m: m(X), rl.Slices(rl.LoRA(r=2), parts=3, on=(0, 2)), target_modules=[],
                 target_parameters=["in_proj_weight"])  # fmt: skip
    base = model.attn.in_proj_weight.detach().clone()
    bank = rl.attach(model, rl.Slices(rl.LoRA(r=2, lora_alpha=4), parts=3, on=(0, 2)), target_modules=[],
                     target_parameters=["in_proj_weight"])  # fmt: skip
    nudge(bank)
    (_, adapter) = next(bank.adapters())
    now = model.attn.in_proj_weight
    assert torch.equal(now[8:16], base[8:16])
    torch.testing.assert_close(now[:8], base[:8] + 2 * adapter.blocks["0"].B @ adapter.blocks["0"].A)
    torch.testing.assert_close(now[16:], base[16:] + 2 * adapter.blocks["2"].B @ adapter.blocks["2"].A)


def test_out_proj_by_name_is_heard():
    """torch reads out_proj's weight without calling it: a wrapper or hook there stays silent."""
    model = Attention(batch_first=True)
    assert_lives(model, lambda m: m(X), rl.LoRA(r=2), target_modules=["out_proj"])
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["out_proj"], probe={"x": X})
    assert bank.probe(X) == ()


def encoder(**settings):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, dtype=D, **settings).eval()


def test_encoder_layer_with_attention_adapted_in_both_paths():
    model = encoder()
    fast = lambda m: m(X)  # noqa: E731

    def slow(m):
        with torch.enable_grad():
            return m(X.clone().requires_grad_()).detach()

    assert difference(fast(model), slow(model)) < 1e-12
    for run in (fast, slow):
        assert_lives(model, run, rl.LoRA(r=2), target_modules=["self_attn"])
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["self_attn"])
    nudge(bank)
    with torch.no_grad():
        assert difference(fast(model), slow(model)) < 1e-10


def test_layers_that_the_fast_path_reads_without_calling_are_reached():
    model = encoder()
    assert_lives(model, lambda m: m(X), rl.LoRA(r=2), target_modules=["linear1", "linear2"])
    rl.attach(model, rl.LoRA(r=2), target_modules=["linear1", "linear2"], probe={"src": X})


def test_probe_leaves_training_flags_alone():
    model = encoder().train()
    model.norm1.eval()
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["self_attn"])
    bank.probe(X)
    assert model.training
    assert model.linear1.training
    assert not model.norm1.training


def test_encoder_stack_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, dtype=D)
    model = nn.TransformerEncoder(layer, 2).eval()
    assert_lives(model, lambda m: m(X), rl.LoRA(r=2), target_modules=["self_attn"])


def test_fused_linear_slices_equal_three_separate_layers():
    fused = nn.Linear(8, 24, dtype=D)
    parts = nn.ModuleDict({n: nn.Linear(8, 8, dtype=D) for n in "qkv"})
    for i, n in enumerate("qkv"):
        parts[n].weight.data = fused.weight.data[8 * i : 8 * i + 8].clone()
        parts[n].bias.data = fused.bias.data[8 * i : 8 * i + 8].clone()
    model = nn.ModuleDict({"qkv": fused})
    one = rl.attach(model, rl.Slices(rl.LoRA(r=2, lora_alpha=4), parts=3, on=(0, 2)), target_modules=["qkv"])
    nudge(one)
    two = rl.attach(parts, rl.LoRA(r=2, lora_alpha=4), target_modules=["q", "v"])
    (_, sliced) = next(one.adapters())
    for (_, adapter), number in zip(two.adapters(), ("0", "2")):
        adapter.A.data, adapter.B.data = sliced.blocks[number].A.data, sliced.blocks[number].B.data
    torch.testing.assert_close(fused(X), torch.cat([parts[n](X) for n in "qkv"], -1))


@pytest.mark.parametrize("method", [rl.Slices(rl.LoRA(r=2)), rl.LoRA(r=2), rl.DoRA(rl.LoRA(r=2))])
def test_gpt2_attention(method):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=12, n_layer=2, n_head=2, n_positions=16)).double().eval()
    ids = torch.randint(0, 32, (2, 5))
    assert_lives(model, lambda m: m(ids).logits, method, target_modules=["c_attn"])
    bank = rl.attach(model, method, target_modules=["c_attn"])
    assert len(bank.sites("default")) == 2


def test_gpt2_key_rows_stay_the_base_under_slices():
    from transformers.pytorch_utils import Conv1D

    model = nn.ModuleDict({"c_attn": Conv1D(24, 8).double()})
    bank = rl.attach(model, rl.Slices(rl.LoRA(r=2)), target_modules=["c_attn"])
    with bank.using():
        base = model["c_attn"](X)
    nudge(bank)
    out = model["c_attn"](X)
    assert torch.equal(out[..., 8:16], base[..., 8:16])
    assert difference(out[..., :8], base[..., :8]) > 1e-3
    assert difference(out[..., 16:], base[..., 16:]) > 1e-3
