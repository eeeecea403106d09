"""Uniform and block-float stores, and the bits underneath."""

from __future__ import annotations

import pytest
import torch

from rankloom.errors import SettingsError
from rankloom.ops.unpack import GROUPS, pack, packed_bytes, unpack
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform, fold_into_zeros


@pytest.mark.parametrize("bits", GROUPS)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 250])
def test_codes_survive_packing(bits, n):
    """Every code of every width comes back, from no more bytes than whole groups need."""
    codes = torch.randint(2**bits, (n,), dtype=torch.uint8)
    data = pack(codes, bits)
    assert data.dtype == torch.uint8
    assert data.numel() == packed_bytes(n, bits)
    assert torch.equal(unpack(data, bits, n), codes)


def test_bytes_by_hand():
    """The first code takes the highest bits."""
    assert pack(torch.tensor([0xA, 0x3], dtype=torch.uint8), 4).tolist() == [0xA3]
    assert pack(torch.tensor([3, 0, 1, 2], dtype=torch.uint8), 2).tolist() == [0b11000110]
    assert pack(torch.arange(8, dtype=torch.uint8), 3).tolist() == [0b00000101, 0b00111001, 0b01110111]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_error_and_idempotence(bits):
    """|W − Ŵ| ≤ half a step of the group; a second round changes nothing that floats can show."""
    w, store = torch.randn(6, 64).double(), Uniform(bits, 16)
    once = store.round_trip(w)
    step = (w.unflatten(1, (-1, 16)).amax(-1) - w.unflatten(1, (-1, 16)).amin(-1)) / (2**bits - 1)
    error = (w - once).abs().unflatten(1, (-1, 16))
    assert (error <= step[..., None] / 2 * (1 + 1e-9)).all()
    assert (error > step[..., None] * 0.4).any()
    assert torch.allclose(store.round_trip(once), once, atol=1e-12)
    assert torch.equal(store.encode(once)["codes"], store.encode(w)["codes"])


def test_uniform_by_hand():
    """One group from −1 to 2 in 2 bits: step 1, zero point 1; each row and group has its own."""
    store = Uniform(2, 4)
    parts = store.encode(torch.tensor([[-1.0, 0.2, 0.9, 2.0, 10.0, 10.0, 13.0, 10.0]]))
    assert parts["scale"].tolist() == [[1.0, 1.0]]
    assert parts["zero"].tolist() == [[1.0, -10.0]]
    assert unpack(parts["codes"], 2, 8).tolist() == [0, 1, 2, 3, 0, 0, 3, 0]
    assert store.decode(parts, torch.Size([1, 8]), torch.float32).tolist() == [[-1, 0, 1, 2, 10, 10, 13, 10]]


def test_uniform_constant_groups():
    """A group without spread is kept."""
    w = torch.cat([torch.full((2, 8), 0.7), torch.zeros(2, 8), torch.full((2, 8), -3.0)], 1)
    assert torch.allclose(Uniform(2, 8).round_trip(w), w, rtol=1e-6)


def test_uniform_bits_and_refusal():
    assert Uniform(4, 32).bits_per_weight() == 6
    assert Uniform(2, 64).bits_per_weight() == 3
    w = torch.randn(4, 64)
    assert Uniform(3, 32).pack(w).stored_bytes * 8 == Uniform(3, 32).bits_per_weight() * w.numel()
    with pytest.raises(SettingsError, match=r"48 columns .* groups of 32"):
        Uniform(4, 32).pack(torch.randn(4, 48))
    with pytest.raises(SettingsError, match="group=0"):
        Uniform(4, 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fold_into_zeros_is_exact(bits):
    """A change that is constant in each group moves only the zero points; codes and scales are the very same tensors."""
    w, change = torch.randn(6, 64).double(), torch.randn(6, 4).double()
    packed = Uniform(bits, 16).pack(w)
    folded = fold_into_zeros(packed, change)
    want = packed.unpack() + change.repeat_interleave(16, 1)
    assert (folded.unpack() - want).abs().max() < 1e-13
    assert folded.parts["codes"] is packed.parts["codes"]
    assert folded.parts["scale"] is packed.parts["scale"]
    assert folded.stored_bytes == packed.stored_bytes
    with pytest.raises(SettingsError, match="group size"):
        fold_into_zeros(packed, change[:, :2])
    with pytest.raises(SettingsError, match="zero points"):
        fold_into_zeros(NormalFloat().pack(w), change)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_block_float_is_exact_on_its_grid(bits):
    """Must hold (LQER): exact on powers of two within reach of the block's largest; idempotent; zero stays zero."""
    store = BlockFloat(bits, 16)
    for top in (-20, 0, 3, 90):
        powers = torch.tensor([2.0 ** (top - i) for i in range(bits - 1)])
        block = torch.cat([powers, -powers, torch.zeros(16 - 2 * len(powers))])
        assert torch.equal(store.round_trip(block), block)
    w = torch.randn(7, 33)
    once = store.round_trip(w)
    assert torch.equal(store.round_trip(once), once)
    assert not store.round_trip(torch.zeros(5, 5)).any()


def test_block_float_by_hand():
    """4 bits: the largest, 6.4, has exponent 2, so the step is 2^(2−2) = 1; mantissas reach ±7."""
    store = BlockFloat(4, 4)
    parts = store.encode(torch.tensor([6.4, -0.6, 2.4, 0.4, 0.99, 0.5, -0.26, 7e-3]))
    assert parts["exponent"].tolist() == [0, -3]
    assert store.decode(parts, torch.Size([8]), torch.float32).tolist() == [6, -1, 2, 0, 0.875, 0.5, -0.25, 0]
    assert BlockFloat(4, 16).bits_per_weight() == 4.5
    assert BlockFloat(4, 16).pack(torch.randn(8, 32)).stored_bytes * 8 == 4.5 * 256


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_block_float_error(bits):
    """|W − Ŵ| is at most a step: half of one by rounding, or what the largest mantissa clips."""
    w = torch.randn(32, 64)
    store = BlockFloat(bits, 16)
    error = (w - store.round_trip(w)).abs().reshape(-1, 16)
    step = store.encode(w)["exponent"].float().exp2()
    assert (error <= step[:, None]).all()
    assert (error.amax(1) > step * 0.2).all()
