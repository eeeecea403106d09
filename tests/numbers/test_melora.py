"""MELoRA (arXiv 2402.17263): an ensemble of small LoRAs on slices of input and output."""

from __future__ import annotations

import copy

import pytest
import torch
from number_tools import count, linear, nudge, only

import rankloom as rl
from rankloom.errors import SettingsError, TargetError
from rankloom.methods.melora import MELoRA


def small_loras(adapter, ranks, scales):
    """s_k B_k A_k of each small LoRA, read off the stored factors."""
    a, b = adapter.A.detach().split(ranks, dim=0), adapter.B.detach().split(ranks, dim=1)
    return [s * (b_k @ a_k) for s, a_k, b_k in zip(scales, a, b)]


@pytest.mark.parametrize(
    ("method", "ranks", "scales"),
    [
        (MELoRA(r=2, lora_alpha=16.0, n=4), (2, 2, 2, 2), (8.0,) * 4),
        (MELoRA(r=(1, 3), lora_alpha=(2.0, 12.0), n=2), (1, 3), (2.0, 4.0)),
        (MELoRA(r=(1, 2), lora_alpha=4.0, n=2), (1, 2), (4.0, 2.0)),
    ],
)
def test_equals_the_block_diagonal_matrix(method, ranks, scales):
    """Must hold: Δy equals the slices through their own s_k B_k A_k, concatenated; ΔW is blockdiag, zero elsewhere."""
    model, x = linear(16, 12), torch.randn(5, 16).double()
    before = model(x)
    adapter = only(rl.attach(model, method))
    nudge(model.rankloom)
    blocks = small_loras(adapter, ranks, scales)
    slices = x.chunk(method.n, dim=-1)
    want = torch.cat([part @ block.T for part, block in zip(slices, blocks)], dim=-1)
    assert torch.allclose(model(x) - before, want, atol=1e-12)
    delta = model.rankloom.delta("default")["fc"]
    assert torch.allclose(delta, torch.block_diag(*blocks), atol=1e-12)
    off = torch.block_diag(*[torch.ones_like(block) for block in blocks]) == 0
    assert not delta[off].any()


def test_rank_and_count():
    """Must hold: n=4, r=2 on 16 → 12: rank 8 with 2·(16+12) = 56 numbers, as a LoRA of rank 2."""
    model = linear(16, 12)
    bank = rl.attach(model, MELoRA(r=2, n=4))
    nudge(bank)
    assert count(bank) == 56
    assert torch.linalg.matrix_rank(bank.delta("default")["fc"]) == 8


def test_one_is_lora():
    """Must hold: n=1 is LoRA: the same start from the same seed, the same change and the same gradients."""
    base, x = linear(6, 5), torch.randn(3, 6).double()
    found = []
    for method in (MELoRA(r=2, lora_alpha=6.0, n=1), rl.LoRA(r=2, lora_alpha=6.0)):
        model = copy.deepcopy(base)
        torch.manual_seed(3)
        adapter = only(rl.attach(model, method))
        torch.manual_seed(4)
        nudge(model.rankloom)
        model(x).square().sum().backward()
        found.append((model(x).detach(), adapter.A.detach(), adapter.A.grad, adapter.B.grad))
    for ours, lora in zip(*found):
        assert torch.allclose(ours, lora, atol=1e-12)


def test_slices_only_see_their_inputs():
    """Must hold: the gradient of a slice of the change with respect to any other slice of the input is zero."""
    model = linear(8, 6, bias=False)
    with torch.no_grad():
        model.fc.weight.zero_()
    nudge(rl.attach(model, MELoRA(r=1, n=2)))
    jacobian = torch.autograd.functional.jacobian(model, torch.randn(8).double())
    assert not jacobian[:3, 4:].any()
    assert not jacobian[3:, :4].any()
    assert jacobian[:3, :4].any()
    assert jacobian[3:, 4:].any()


def test_identity_at_init():
    """Must hold: identity at init; A_k is uniform in ±1/√(in/n), B zero."""
    model, x = linear(16, 12), torch.randn(3, 16).double()
    before = model(x)
    adapter = only(rl.attach(model, MELoRA(r=8, n=4)))
    assert torch.equal(model(x), before)
    assert 0.4 < adapter.A.abs().max() <= 0.5
    assert not adapter.B.any()


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (2, 3, 4, 6)])
def test_any_number_of_dims(shape):
    """Pitfall: the released class takes 3-d inputs only, and cannot merge."""
    model, x = linear(6, 4), torch.randn(*shape).double()
    bank = rl.attach(model, MELoRA(r=1, n=2))
    nudge(bank)
    adapted = model(x)
    bank.merge()
    assert torch.allclose(model(x), adapted, atol=1e-12)


def test_settings_are_kept_as_lists(tmp_path):
    """Must hold: saves lists."""
    base, x = linear(6, 4, dtype=torch.float32), torch.randn(3, 6)
    model = copy.deepcopy(base)
    nudge(rl.attach(model, MELoRA(r=(1, 2), lora_alpha=(3.0, 8.0), n=2)))
    rl.save(model, tmp_path / "a")
    again = copy.deepcopy(base)
    bank = rl.load(again, tmp_path / "a")
    bank.use("default")
    assert bank.plans["default"].method == MELoRA(r=(1, 2), lora_alpha=(3.0, 8.0), n=2)
    assert torch.equal(again(x), model(x))


def test_refusals():
    with pytest.raises(SettingsError, match=r"r=\(1, 2, 3\).*n=2"):
        MELoRA(r=(1, 2, 3), n=2)
    with pytest.raises(SettingsError, match=r"lora_alpha=\(1\.0,\)"):
        MELoRA(lora_alpha=(1.0,), n=2)
    with pytest.raises(SettingsError, match=r"r\[1\]=0"):
        MELoRA(r=(1, 0), n=2)
    with pytest.raises(TargetError, match=r"'fc' has 6 columns.*n=4"):
        rl.attach(linear(6, 8), MELoRA(n=4))
    with pytest.raises(TargetError, match=r"'fc' has 6 rows.*n=4"):
        rl.attach(linear(8, 6), MELoRA(n=4))
