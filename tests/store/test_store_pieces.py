"""Packed weights in pieces: whole blocks stay packed, anything else is refused."""

from __future__ import annotations

import pytest
import torch

from rankloom.errors import StateError
from rankloom.store import dense
from rankloom.store.base import Packed
from rankloom.store.blockfloat import BlockFloat
from rankloom.store.nested import NestedFloat
from rankloom.store.normalfloat import NormalFloat
from rankloom.store.uniform import Uniform

STORES = {
    "nf4": NormalFloat(block=16, double_block=16),
    "nf3": NormalFloat(3, 32, double=False),
    "nested": NestedFloat(3, 4, "float16", 16, 16),
    "int3": Uniform(3, 16),
    "mxint4": BlockFloat(4, 16),
}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_pieces_of_whole_blocks(store):
    """chunk, split and split by sizes give packed pieces with the very weights; a shorter last piece too."""
    w = torch.randn(20, 64)
    packed = store.pack(w)
    whole = dense(packed)
    for pieces in (packed.chunk(5), packed.split(8), torch.split(packed, [4, 16])):
        assert all(isinstance(p, Packed) for p in pieces)
        assert torch.equal(torch.cat([dense(p) for p in pieces]), whole)
        held = sum(part.numel() for p in pieces for n, part in p.parts.items() if part.ndim)
        assert held == sum(part.numel() for part in packed.parts.values() if part.ndim)
    x = torch.randn(3, 64)
    y = torch.cat([torch.nn.functional.linear(x, p) for p in packed.chunk(5)], -1)
    assert torch.allclose(y, x @ whole.T, atol=1e-5)
    again = store.encode(torch.empty(4, 64, device="meta"))
    assert {n: p.shape for n, p in packed.chunk(5)[0].parts.items()} == {n: p.shape for n, p in again.items()}


def test_anything_else_is_refused():
    """Within a block, along the columns: a dense piece would silently undo the packing."""
    packed = NormalFloat(block=64, double_block=256).pack(torch.randn(20, 32))
    with pytest.raises(StateError, match=r"splits along dim 0 between blocks, not into pieces of 5 along dim 0"):
        packed.split(5)
    with pytest.raises(StateError, match=r"along dim 1: unpack it first"):
        Uniform(3, 16).pack(torch.randn(4, 64)).chunk(2, dim=1)
    assert torch.equal(packed[3:5], dense(packed)[3:5])
