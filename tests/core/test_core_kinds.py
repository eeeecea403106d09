"""Every kind of layer, against the layer that torch itself would build with W + ΔW written into it."""

import copy

import pytest
import torch
from core_tiny import assert_lives, difference, nudge
from torch import nn

import rankloom as rl
from rankloom.core.kinds import kind_of
from rankloom.errors import TargetError

D = torch.float64


def conv(dim, *args, **settings):
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1](*args, **settings, dtype=D)


def image(dim, channels=4, batch=2, size=7):
    lead = () if batch is None else (batch,)
    return torch.randn(*lead, channels, *(size,) * dim, dtype=D)


class Alone(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


CONVOLUTIONS = {
    "1d": (1, {"kernel_size": 3}),
    "1d-all": (1, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    "1d-circular": (1, {"kernel_size": 3, "padding": 2, "padding_mode": "circular"}),
    "1d-same": (1, {"kernel_size": 4, "padding": "same"}),
    "2d": (2, {"kernel_size": 3, "bias": False}),
    "2d-oblong": (2, {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)}),
    "2d-reflect": (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    "2d-groups": (2, {"kernel_size": 3, "padding": 1, "groups": 2}),
    "2d-depthwise": (2, {"kernel_size": 3, "padding": 1, "groups": 4, "out": 4}),
    "2d-depthwise-x2": (2, {"kernel_size": 3, "groups": 4, "out": 8}),
    "2d-1x1": (2, {"kernel_size": 1}),
    "2d-1x1-groups": (2, {"kernel_size": 1, "groups": 2}),
    "3d": (3, {"kernel_size": 2, "stride": 2}),
    "3d-circular-groups": (3, {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "groups": 2}),
}


def convolution(name):
    dim, settings = CONVOLUTIONS[name]
    settings = dict(settings)
    return conv(dim, 4, settings.pop("out", 6), **settings), dim


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("batch", [2, None])
def test_convolution_lora_is_a_kernel_change(name, batch):
    layer, dim = convolution(name)
    x = image(dim, batch=batch)
    assert_lives(Alone(layer), lambda m: m(x), rl.LoRA(r=2, lora_alpha=3), target_modules=["layer"])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_torch_with_the_changed_kernel(name):
    layer, dim = convolution(name)
    plain, model, x = copy.deepcopy(layer), Alone(layer), image(dim)
    bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=3), target_modules=["layer"])
    nudge(bank)
    (_, adapter) = next(bank.adapters())
    kernel = 1.5 * (adapter.B @ adapter.A).reshape(plain.weight.shape)
    plain.weight.data += kernel.detach()
    torch.testing.assert_close(model(x), plain(x))
    site = bank.sites("default")[0]
    torch.testing.assert_close(adapter(x, plain(x), site.base), site.base.apply(x, adapter.delta(site.base)))


@pytest.mark.parametrize("method", [rl.DoRA(rl.LoRA(r=2)), rl.VeRA(r=3), rl.AdaLoRA(init_r=2, target_r=1)])
@pytest.mark.parametrize("name", ["1d-all", "2d-groups", "2d-depthwise", "3d-circular-groups"])
@pytest.mark.parametrize("batch", [2, None])
def test_other_methods_on_convolutions(name, method, batch):
    layer, dim = convolution(name)
    x = image(dim, batch=batch)
    assert_lives(Alone(layer), lambda m: m(x), method, target_modules=["layer"])


def test_spatial_lora_parameter_count_is_the_convolution_formula():
    layer = conv(2, 4, 6, kernel_size=3)
    bank = rl.attach(Alone(layer), rl.LoRA(r=2), target_modules=["layer"])
    assert sum(p.numel() for _, p, _ in bank.tensors("default")) == 2 * 4 * 9 + 6 * 2


@pytest.mark.parametrize("name", ["2d", "2d-groups", "2d-depthwise", "2d-1x1", "2d-reflect"])
def test_unrolled_lora_reshapes_the_product_like_the_reference(name):
    layer, dim = convolution(name)
    x = image(dim)
    assert_lives(
        Alone(copy.deepcopy(layer)), lambda m: m(x), rl.UnrolledLoRA(r=2, lora_alpha=3), target_modules=["layer"]
    )
    plain, model = copy.deepcopy(layer), Alone(layer)
    bank = rl.attach(model, rl.UnrolledLoRA(r=2, lora_alpha=3), target_modules=["layer"])
    nudge(bank)
    (_, adapter) = next(bank.adapters())
    k = plain.kernel_size[0]
    assert adapter.A.shape == (2 * k, plain.in_channels * k)
    assert adapter.B.shape == (plain.out_channels // plain.groups * k, 2 * k)
    plain.weight.data += 1.5 * (adapter.B @ adapter.A).view(plain.weight.shape).detach()
    torch.testing.assert_close(model(x), plain(x))


def test_unrolled_lora_refuses_oblong_kernels_and_other_layers():
    with pytest.raises(TargetError, match="square kernel"):
        rl.attach(Alone(conv(2, 4, 6, kernel_size=(2, 3))), rl.UnrolledLoRA(r=2), target_modules=["layer"])
    with pytest.raises(TargetError, match="square kernel"):
        rl.attach(Alone(nn.Linear(3, 3)), rl.UnrolledLoRA(r=2), target_modules=["layer"])


METHODS = {
    "lora": rl.LoRA(r=2, lora_alpha=3),
    "lora_bias": rl.LoRA(r=2, lora_alpha=3, lora_bias=True),
    "pissa": rl.LoRA(r=2, init_lora_weights="pissa", lora_bias=True),
    "dora": rl.DoRA(rl.LoRA(r=2)),
    "dora_bias": rl.DoRA(rl.LoRA(r=2, lora_bias=True)),
    "vera": rl.VeRA(r=3),
    "adalora": rl.AdaLoRA(init_r=2, target_r=1),
    "slices": rl.Slices(rl.LoRA(r=2, lora_bias=True), parts=3, on=(0, 2)),
    "slices_dora": rl.Slices(rl.DoRA(rl.LoRA(r=2)), parts=3, on=(1,)),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("bias", [True, False])
def test_linear(method, bias):
    x = torch.randn(2, 3, 5, dtype=D)
    assert_lives(Alone(nn.Linear(5, 6, bias=bias, dtype=D)), lambda m: m(x), method, target_modules=["layer"])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_transposed_linear_of_gpt2(method):
    from transformers.pytorch_utils import Conv1D

    layer, x = Conv1D(6, 5).double(), torch.randn(2, 3, 5, dtype=D)
    nn.init.normal_(layer.weight)
    assert_lives(Alone(layer), lambda m: m(x), method, target_modules=["layer"])


def test_transposed_linear_equals_the_written_weight():
    from transformers.pytorch_utils import Conv1D

    layer, x = Conv1D(6, 5).double(), torch.randn(4, 5, dtype=D)
    plain, model = copy.deepcopy(layer), Alone(layer)
    bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=3), target_modules=["layer"])
    nudge(bank)
    (_, adapter) = next(bank.adapters())
    assert adapter.A.shape == (2, 5)
    assert adapter.B.shape == (6, 2)
    plain.weight.data += 1.5 * (adapter.A.T @ adapter.B.T).detach()
    torch.testing.assert_close(model(x), plain(x))


def gemma(padding=0):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(7, 5, padding, embed_scale=3.0).double()


EMBEDDINGS = {
    "plain": lambda: nn.Embedding(7, 5, dtype=D),
    "padding": lambda: nn.Embedding(7, 5, padding_idx=2, dtype=D),
    "scaled": gemma,
}
LOOKUPS = {k: v for k, v in METHODS.items() if "bias" not in k and k not in ("pissa", "slices", "slices_dora")}
LOOKUPS["slices"] = rl.Slices(rl.LoRA(r=2), parts=5, on=(0, 3))


@pytest.mark.parametrize("method", LOOKUPS.values(), ids=LOOKUPS.keys())
@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_embedding(method, make):
    ids = torch.tensor([[0, 1, 2], [6, 5, 2]])
    assert_lives(Alone(make()), lambda m: m(ids), method, target_modules=["layer"])


@pytest.mark.parametrize("make", EMBEDDINGS.values(), ids=EMBEDDINGS.keys())
def test_embedding_equals_the_written_table(make):
    layer, ids = make(), torch.tensor([[0, 1, 2], [6, 5, 2]])
    plain, model = copy.deepcopy(layer), Alone(layer)
    bank = rl.attach(model, rl.LoRA(r=2, lora_alpha=3), target_modules=["layer"])
    nudge(bank)
    (_, adapter) = next(bank.adapters())
    plain.weight.data += 1.5 * (adapter.A.T @ adapter.B.T).detach()
    torch.testing.assert_close(model(ids), plain(ids))


def test_the_padding_row_of_an_embedding_gets_no_gradient():
    layer = nn.Embedding(7, 5, padding_idx=2, dtype=D)
    model = Alone(layer)
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["layer"])
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    (_, adapter) = next(bank.adapters())
    assert adapter.A.grad[:, 2].abs().max() == 0
    assert adapter.A.grad[:, 1].abs().max() > 0


def test_lookup_by_ids_of_any_shape():
    model = Alone(nn.Embedding(7, 5, dtype=D))
    bank = rl.attach(model, rl.LoRA(r=2), target_modules=["layer"])
    nudge(bank)
    assert difference(model(torch.tensor(3)), model(torch.tensor([[3]]))[0, 0]) < 1e-12


def test_a_subclass_is_of_its_parents_kind_and_a_stranger_of_none():
    class Mine(nn.Linear):
        pass

    assert kind_of(Mine(2, 2)).name == "linear"
    assert kind_of(nn.LayerNorm(2)) is None
    assert kind_of(nn.ConvTranspose1d(2, 2, 1)) is None


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5)], ids=["bare", "stacked"])
def test_bare_and_stacked_parameters(method, shape):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(shape, dtype=D))

        def forward(self, x):
            return x @ self.w.mT

    x = torch.randn(3, 5, dtype=D)
    assert_lives(Owner(), lambda m: m(x), method, target_modules=[], target_parameters=["w"])


def test_each_expert_of_a_stack_has_a_pair_of_its_own():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6, 5, dtype=D))

    owner = Owner()
    base = owner.w.detach().clone()
    bank = rl.attach(owner, rl.LoRA(r=2, lora_alpha=3), target_modules=[], target_parameters=["w"])
    nudge(bank)
    (_, adapter) = next(bank.adapters())
    assert adapter.A.shape == (4, 2, 5)
    assert adapter.B.shape == (4, 6, 2)
    for e in range(4):
        torch.testing.assert_close(owner.w[e], base[e] + 1.5 * adapter.B[e] @ adapter.A[e])
