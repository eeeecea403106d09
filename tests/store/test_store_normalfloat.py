"""NF-k tables and rounding (QLoRA, arXiv 2305.14314): what must hold of the storage."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch

from rankloom.errors import SettingsError
from rankloom.ops.unpack import packed_bytes, unpack
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat, dynamic_code, quantiles

PUBLISHED = {
    3: [-1, -0.4786, -0.2171, 0, 0.1609, 0.3379, 0.5626, 1],
    4: [
        -1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0,
        0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1,
    ],
}  # fmt: skip
# The 4-bit float of bitsandbytes: sign and 8 magnitudes.
FP4 = sorted({s * v for s in (-1, 1) for v in (0, 0.0052, 0.6667, 1, 0.3333, 0.5, 0.1667, 0.25)})


def _codes(store, parts, n):
    return unpack(parts["codes"], store.bits, n)


def test_published_tables():
    """Must hold: table as published; NF3's to its four digits, NF4's to 1e-5 of the digits printed."""
    assert quantiles(3) == pytest.approx(PUBLISHED[3], abs=6e-5)
    assert quantiles(4) == pytest.approx(PUBLISHED[4], abs=6e-6)


def test_table_by_formula():
    """Must hold: NF4 to 1e-6 by the quantile formula, written here again."""
    off, inv = 0.9677083, NormalDist().inv_cdf
    points = torch.linspace(off, 0.5, 9, dtype=torch.float64)[:-1].tolist()
    below = torch.linspace(off, 0.5, 8, dtype=torch.float64)[:-1].tolist()
    values = sorted([inv(p) for p in points] + [0.0] + [-inv(p) for p in below])
    assert quantiles(4) == pytest.approx([v / max(values) for v in values], abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_points_are_exact(bits):
    """Must hold: the code of a grid point times any absmax is that point; zero maps to zero; codes are those expected."""
    grid = torch.tensor(quantiles(bits), dtype=torch.float32)
    assert len(grid) == 2**bits
    assert float(grid[0]) == -1
    assert float(grid[-1]) == 1
    assert 0 in grid
    store = NormalFloat(bits, block=len(grid), double=False)
    for size in (1.0, 0.5, 3.0, 1e-6, 1e20):
        parts = store.encode(grid * size)
        assert _codes(store, parts, len(grid)).tolist() == list(range(2**bits))
        assert torch.equal(store.round_trip(grid * size), grid * parts["absmax"])
    assert not store.round_trip(torch.zeros(3, 7)).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("block", [16, 64])
def test_error_is_half_a_gap_at_most(bits, block):
    """Must hold: |W − Ŵ| ≤ half the largest gap · absmax of the block, and nothing coarser does as well."""
    w = torch.randn(24, 2 * block)
    gaps = torch.tensor(quantiles(bits)).diff()
    blocks = (w - NormalFloat(bits, block, double=False).round_trip(w)).abs().reshape(-1, block)
    limit = w.reshape(-1, block).abs().amax(1, keepdim=True) * float(gaps.max()) / 2
    assert (blocks <= limit * (1 + 1e-6)).all()
    assert (blocks > 0.7 * limit).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("double", [False, True])
def test_idempotent(bits, double):
    """Must hold: quant(deq(q)) = q; without double quantisation the values come back bit for bit too."""
    store, w = NormalFloat(bits, double=double), torch.randn(48, 64)
    parts = store.encode(w)
    once = store.decode(parts, w.shape, w.dtype)
    again = store.encode(once)
    assert torch.equal(again["codes"], parts["codes"])
    if not double:
        assert torch.equal(store.decode(again, w.shape, w.dtype), once)


def test_bits_per_weight():
    """Must hold: 4.127 and 4.5 bits; NestedFloat's formula gives the same, and 3.127; bytes are those of the parts."""
    assert NormalFloat().bits_per_weight() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))
    assert NormalFloat().bits_per_weight() == pytest.approx(4.127, abs=5e-4)
    assert NormalFloat(double=False).bits_per_weight() == 4.5
    assert NestedFloat(4, 8, "float32", 64, 256).bits_per_weight() == pytest.approx(4.127, abs=5e-4)
    assert NestedFloat(3, 8, "float32", 64, 256).bits_per_weight() == pytest.approx(3.127, abs=5e-4)
    w = torch.randn(256, 64 * 8)
    for store in (NormalFloat(), NormalFloat(double=False), NestedFloat(2, 4, "float16", 32, 64)):
        exact = store.bits_per_weight() * w.numel() / 8
        assert store.pack(w).stored_bytes == pytest.approx(exact, abs=4)  # one offset number


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 1000])
def test_packed_size(n):
    """Must hold: 4-bit codes of n weights take ceil(n/2) bytes; 2 and 3 bits whole groups."""
    w = torch.randn(n)
    assert NormalFloat(4).encode(w)["codes"].numel() == -(-n // 2) == packed_bytes(n, 4)
    assert NormalFloat(2).encode(w)["codes"].numel() == -(-n // 4)
    assert NormalFloat(3).encode(w)["codes"].numel() == 3 * -(-n // 8)
    assert NormalFloat(8).encode(w)["codes"].numel() == n
    for bits in (2, 3, 4, 8):
        assert NormalFloat(bits).pack(w).unpack().shape == (n,)


def _by_absmax(w, grid):
    """Round-trip through any table with blocks of 64."""
    grid, absmax = torch.tensor(grid), w.reshape(-1, 64).abs().amax(1, keepdim=True)
    scaled = w.reshape(-1, 64) / absmax
    nearest = (scaled[..., None] - grid).abs().argmin(-1)
    return (grid[nearest] * absmax).reshape(w.shape)


def test_order_of_errors():
    """Must hold: on Gaussian weights the squared error of NF4 < int4 < FP4: .0085, .0116, .0149 of unit variance."""
    w = torch.randn(512, 256)
    errors = [
        (w - NormalFloat(double=False).round_trip(w)).square().mean().item(),
        (w - _by_absmax(w, [i / 7 for i in range(-7, 8)])).square().mean().item(),
        (w - _by_absmax(w, FP4)).square().mean().item(),
    ]
    assert errors == pytest.approx([0.0085, 0.0116, 0.0149], rel=0.02)
    assert _by_absmax(w, quantiles(4)).sub(NormalFloat(double=False).round_trip(w)).abs().max() < 1e-6


def test_double_quantisation_is_fine():
    """Must hold: two-level scales err by less than 1 %, and the weights get hardly worse."""
    w = torch.randn(512, 256)
    single, double = NormalFloat(double=False), NormalFloat()
    exact, kept = single.scales(single.encode(w)), double.scales(double.encode(w))
    relative = ((kept - exact) / exact).abs()
    assert relative.mean() < 0.005
    assert relative.max() < 0.01
    errors = [(w - s.round_trip(w)).square().mean().item() for s in (single, double)]
    assert errors[1] == pytest.approx(errors[0], rel=0.005)


def test_dynamic_code():
    """The 8-bit code: 256 ascending values with 0 and 1, symmetric but for 1, finer towards zero."""
    code = dynamic_code()
    assert len(code) == 256
    assert list(code) == sorted(set(code))
    assert 0.0 in code
    assert max(code) == 1.0
    assert {-v for v in code if v < 0} == {v for v in code if v > 0} - {1.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_quantised_in_float32(dtype):
    """Pitfall: half-precision weights are quantised in float32: codes and scales are those of the widened weight."""
    w = torch.randn(16, 64).to(dtype)
    for store in (NormalFloat(), NormalFloat(double=False), NestedFloat()):
        ours, wide = store.encode(w), store.encode(w.float())
        assert all(torch.equal(ours[k], wide[k]) for k in wide)
        assert store.pack(w).unpack().dtype == dtype


@pytest.mark.parametrize("shape", [(5, 7), (3, 100), (1, 1), (2, 3, 33)])
def test_not_a_multiple_of_the_block(shape):
    """Pitfall: a last, shorter block has a scale of its own and nothing leaks from the padding."""
    w = torch.randn(shape)
    store = NormalFloat(double=False)
    parts, flat = store.encode(w), w.flatten()
    assert parts["absmax"].tolist() == [b.abs().max().item() for b in flat.split(64)]
    assert (store.round_trip(w) - w).abs().max() <= 0.16 * w.abs().max()


def test_nested_scales_by_hand():
    """LQ-LoRA's scales: unsigned steps above the smallest; two blocks at the ends of the range are exact."""
    w = torch.tensor([1.0, 0.0, -3.0, 0.0, 2.0, 0.0])  # absmax 1, 3, 2 in blocks of 2
    store = NestedFloat(4, scale_bits=2, block=2, double_block=4)
    parts = store.encode(w)
    assert parts["scale_offset"].item() == 1
    assert parts["scale_top"].tolist() == [2]
    assert unpack(parts["scale_codes"], 2, 3).tolist() == [0, 3, 2]  # 1, 3, and 2 → 1 + 2·(2/3)
    assert store.round_trip(w)[:4].tolist() == [1, 0, -3, 0]
    assert store.round_trip(w)[4].item() == pytest.approx(0.7229568362236023 * (1 + 4 / 3), rel=1e-6)


def test_nested_error_falls_with_bits():
    """More bits, for weights or for scales, and smaller blocks: never a larger error on Gaussian weights."""
    w = torch.randn(128, 128) * (0.1 + torch.rand(128, 1))
    error = lambda **s: (w - NestedFloat(**s).round_trip(w)).norm().item()  # noqa: E731
    assert error(bits=2) > error(bits=3) > error(bits=4) > error(bits=8)
    assert error(scale_bits=2) > error(scale_bits=3) > error(scale_bits=4) > error(scale_bits=8)
    assert error(block=16) < error(block=32) < error(block=64)
    assert error(scale_dtype="bfloat16") == pytest.approx(error(), rel=0.01)


def test_constant_and_huge_weights():
    """All-zero and constant tensors come back, and values near the end of float32 stay finite."""
    for store in (NormalFloat(), NormalFloat(double=False), NestedFloat()):
        assert not store.round_trip(torch.zeros(4, 64)).any()
        assert torch.allclose(store.round_trip(torch.full((4, 64), 0.3)), torch.tensor(0.3), rtol=1e-6)
        assert torch.isfinite(store.round_trip(torch.randn(4, 64) * 1e37)).all()


@pytest.mark.parametrize(
    "make",
    [lambda: NormalFloat(5), lambda: NormalFloat(block=0), lambda: NestedFloat(scale_bits=1), lambda: NestedFloat(9)],
)
def test_refuses_settings(make):
    with pytest.raises(SettingsError):
        make()


def test_the_table_of_scales_is_made_of_numbers_wherever_it_is_first_asked_for():
    with torch.device("meta"):
        assert dynamic_code.__wrapped__() == dynamic_code()
