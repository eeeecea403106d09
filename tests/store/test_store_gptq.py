"""GPTQ against a plain reference, against round to nearest, and as a store for a whole model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rankloom as rl
from rankloom.errors import SettingsError, TargetError, UnreachedError
from rankloom.methods.qalora import QALoRA
from rankloom.ops.affine import gptq
from rankloom.store import dense
from rankloom.store.base import Packed
from rankloom.store.calibrate import hessians
from rankloom.store.gptq import keep_gptq, pack_gptq
from rankloom.store.model import keep
from rankloom.store.uniform import Uniform


def reference(w, hessian, bits, group, damp):
    """Column by column with the inverse Hessian itself: after each column, every one to its right is corrected."""
    w, h = w.clone(), hessian.clone()
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    out = torch.empty_like(w)
    inverse = torch.linalg.inv(h)
    for j in range(w.shape[1]):
        if j % group == 0:
            low, high = w[:, j : j + group].amin(1), w[:, j : j + group].amax(1)
            scale = (high - low) / (2**bits - 1)
            zero = -low / scale
        out[:, j] = scale * ((w[:, j] / scale + zero).round().clamp(0, 2**bits - 1) - zero)
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, j:] -= torch.outer(error, inverse[0])
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return out


def correlated(rows, columns, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return (torch.randn(rows, columns // 4, dtype=dtype) @ torch.randn(columns // 4, columns, dtype=dtype)) + (
        0.3 * torch.randn(rows, columns, dtype=dtype)
    )


@pytest.mark.parametrize(("bits", "group", "columns"), [(2, 16, 64), (3, 32, 192), (4, 160, 320), (8, 8, 40)])
def test_equals_the_reference(bits, group, columns):
    """Blocks of columns give what one column after the other gives, groups wider and narrower than a block included."""
    x = correlated(500, columns)
    w = torch.randn(12, columns, dtype=torch.float64)
    found = gptq(w, x.T @ x, bits, group, damp=0.05)
    got = found.scale.repeat_interleave(group, 1) * (found.codes - found.zero.repeat_interleave(group, 1))
    assert torch.allclose(got, reference(w, x.T @ x, bits, group, 0.05), atol=1e-9)
    assert found.codes.min() >= 0
    assert found.codes.max() <= 2**bits - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_correlation_it_rounds_to_nearest(dtype):
    """An identity Hessian feeds nothing back: the very parts of Uniform, also with columns that no input reaches."""
    w, store = torch.randn(12, 96).to(dtype), Uniform(3, 32)
    hessian = torch.eye(96)
    hessian[5, 5] = 0
    plain, mine = store.pack(w), pack_gptq(w, store, hessian)
    assert mine.store == store
    assert mine.dtype == dtype
    assert mine.parts.keys() == plain.parts.keys()
    for name, part in plain.parts.items():
        assert mine.parts[name].dtype == part.dtype
        assert torch.equal(mine.parts[name], part)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_is_below_round_to_nearest(bits):
    """‖(W − Ŵ)X‖ falls clearly, and the weight itself comes out worse: the codes follow the data."""
    x = correlated(600, 128, dtype=torch.float32)
    w, store = torch.randn(64, 128), Uniform(bits, 32)
    plain, mine = dense(store.pack(w)), dense(pack_gptq(w, store, x.T @ x))
    assert ((w - mine) @ x.T).norm() < 0.7 * ((w - plain) @ x.T).norm()
    assert (w - mine).norm() > (w - plain).norm()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))


STORES = {f"{i}.weight": Uniform(3, 32) for i in (0, 2, 4)}


def test_hessians_by_hand():
    model, batches = net(), [torch.randn(3, 5, 64), torch.randn(2, 64)]
    found = hessians({"0": model[0], "2": model[2]}, batches, model)
    rows = torch.cat([b.reshape(-1, 64) for b in batches])
    assert torch.allclose(found["0"], rows.T @ rows, rtol=1e-4, atol=1e-4)
    inner = torch.tanh(model[0](rows)).detach()
    assert torch.allclose(found["2"], inner.T @ inner, rtol=1e-4, atol=1e-4)
    assert not model[0]._forward_pre_hooks


def test_whole_model():
    """Packed as Uniform, nearer to the dense model than rounding to nearest; sequential sees what the layers before give."""
    base = net()
    data = 0.3 * correlated(600, 64, dtype=torch.float32)
    batches, fresh = list(data[:500].split(50)), data[500:]
    plain, seen, once = (copy.deepcopy(base) for _ in range(3))
    saving = keep(plain, STORES)
    assert keep_gptq(seen, STORES, batches, seen) == saving
    keep_gptq(once, STORES, batches, once, sequential=False)
    assert all(
        isinstance(m[i].weight, Packed) and m[i].weight.store == Uniform(3, 32) for m in (seen, once) for i in (0, 2)
    )
    assert torch.equal(seen[0].weight.parts["codes"], once[0].weight.parts["codes"])
    assert not torch.equal(seen[4].weight.parts["codes"], once[4].weight.parts["codes"])
    error = {n: (m(fresh) - base(fresh)).norm().item() for n, m in (("plain", plain), ("seen", seen), ("once", once))}
    assert error["seen"] < 0.8 * error["plain"]
    assert error["once"] < 0.8 * error["plain"]
    inside = hessians({"2": seen[2]}, batches, seen)["2"]
    assert torch.equal(seen[2].weight.parts["codes"], pack_gptq(base[2].weight, Uniform(3, 32), inside).parts["codes"])


def test_qa_lora_merges_into_it_without_loss():
    """QA-LoRA on GPTQ codes: merged into the zero points, still packed, the same codes."""
    model = net().double()
    batches = [correlated(80, 64)]
    keep_gptq(model, STORES, batches, model)
    bank = rl.attach(model, QALoRA(r=4, group_size=32), target_modules=["0", "2"])
    with torch.no_grad():
        for _, p, _ in bank.trainable():
            p.add_(torch.randn_like(p) * 0.1)
    said, codes = model(batches[0]), model[0].weight.parts["codes"].clone()
    lost = bank.merge(into="store")
    assert max(lost.values()) < 1e-12
    assert (model(batches[0]) - said).abs().max() < 1e-12
    assert torch.equal(model[0].weight.parts["codes"], codes)


def test_refusals():
    model = net()
    with pytest.raises(TargetError, match=r"'0\.bias' is no weight of a linear layer"):
        keep_gptq(model, {"0.bias": Uniform(4, 32)}, [], model)
    with pytest.raises(UnreachedError, match="no batch reached the layer '0.weight'"):
        keep_gptq(model, {"0.weight": Uniform(4, 32)}, [], model)
    with pytest.raises(SettingsError, match="do not fit"):
        gptq(torch.randn(4, 30), torch.eye(30), 4, 32)
    with pytest.raises(SettingsError, match="not positive definite"):
        gptq(torch.randn(4, 32), -torch.eye(32), 4, 32)
    assert not isinstance(model[0].weight, Packed)
