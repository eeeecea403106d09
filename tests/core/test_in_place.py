"""What follows an adapted layer may change its output in place: the gradients are those of the out-of-place form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom.ops.kept import kept_bytes

METHODS = {
    "lora": rl.LoRA(r=2),
    "lora with bias": rl.LoRA(r=2, lora_bias=True),
    "lora with dropout": rl.LoRA(r=2, lora_dropout=0.2),
    "dora": rl.DoRA(rl.LoRA(r=2)),
    "dora with dropout": rl.DoRA(rl.LoRA(r=2, lora_dropout=0.2)),
    "vera": rl.VeRA(r=4),
}
FOLLOWERS = {"relu": nn.ReLU, "silu": nn.SiLU, "dropout": nn.Dropout, "hardtanh": nn.Hardtanh}


class Divided(nn.Module):
    """Attention that scales its query in place, and reads the same input twice."""

    def __init__(self, bias, inplace):
        super().__init__()
        self.q, self.k, self.inplace = nn.Linear(16, 16, bias=bias), nn.Linear(16, 16, bias=bias), inplace

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        q = q.div_(3.0) if self.inplace else q / 3.0
        return (q @ k.transpose(-1, -2)) @ x


def gradients(make, method, inplace, shape, dtype):
    torch.manual_seed(0)
    net = make(inplace).to(dtype)
    bank = rl.attach(net, method, target_modules="all-linear")
    trained = [p for _, p, _ in bank.tensors("default") if p.requires_grad]
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p) * 0.1)
    x = torch.randn(*shape, 16, dtype=dtype)
    for _ in range(2):  # the second pass runs in the groups that the first has shown
        torch.manual_seed(2)
        net.zero_grad()
        net(x).square().sum().backward()
    return [p.grad for p in trained]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("follower", [*FOLLOWERS, "divided"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_form_out_of_place(name, follower, bias, shape, dtype):
    def make(inplace):
        if follower == "divided":
            return Divided(bias, inplace)
        after = FOLLOWERS[follower](inplace=inplace)
        return nn.Sequential(nn.Linear(16, 16, bias=bias), after, nn.Linear(16, 4, bias=bias))

    if follower == "divided" and len(shape) == 1:
        pytest.skip("attention needs a batch")
    given, right = (gradients(make, METHODS[name], inplace, shape, dtype) for inplace in (True, False))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(given, right):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
        assert ours.abs().max() > 0


def test_dora_keeps_no_second_output_for_that():
    """The output is shared with what follows, and made anew only where that changed it."""
    net, x = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.randn(8, 16, 64)
    rl.attach(net, rl.DoRA(rl.LoRA(r=2)), target_modules=["0"])
    net(x)
    kept = kept_bytes([net(x)], [*net.parameters(), x])
    output = 8 * 16 * 64 * 4
    assert output <= kept < 1.5 * output
