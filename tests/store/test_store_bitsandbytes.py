"""bitsandbytes as an oracle: the same bytes, and the same weights from its bytes.

Rows are multiples of 64 or odd: its CPU kernel misreads rows that are other multiples of 32.
"""

from __future__ import annotations

import pytest
import torch

from rankloom.ops.unpack import unpack
from rankloom.store.normalfloat import NormalFloat, dynamic_code

bnb = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(128, 128), (64, 192), (3, 64), (5, 7), (1, 100), (33, 65), (300, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _theirs(w, double):
    data, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64, compress_statistics=double)
    parts = {"codes": data.flatten()}
    if double:
        parts |= {"absmax8": state.absmax.flatten(), "absmax_scale": state.state2.absmax, "absmax_offset": state.offset}
    else:
        parts |= {"absmax": state.absmax}
    return parts, bnb.dequantize_4bit(data, state)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
def test_decodes_their_bytes(shape, dtype, double):
    """Codes, absmax and nested absmax that bitsandbytes packed give its dequantised weight, bit for bit."""
    parts, weight = _theirs(torch.randn(shape).to(dtype), double)
    ours = NormalFloat(double=double).decode(parts, weight.shape, dtype)
    assert torch.equal(ours, weight)
    assert weight.float().std() > 0.3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encodes_the_same_bytes(shape, dtype):
    """Un-nested data: every code and scale is the one that bitsandbytes chooses."""
    w = torch.randn(shape).to(dtype)
    parts, _ = _theirs(w, double=False)
    ours = NormalFloat(double=False).encode(w)
    assert torch.equal(unpack(ours["codes"], 4, w.numel()), unpack(parts["codes"], 4, w.numel()))
    assert torch.equal(ours["absmax"], parts["absmax"])


def test_same_dynamic_code():
    """The 8-bit table of the scales."""
    assert torch.equal(torch.tensor(dynamic_code()), bnb.create_dynamic_map())
