"""The mask of dropout comes again from what is kept of it."""

import pytest
import torch

from rankloom.ops.dropout import drop, masked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_mask_comes_again(p, dtype):
    torch.manual_seed(0)
    x, t, into = (torch.randn(40, 37, dtype=torch.float64).to(dtype) for _ in range(3))
    dropped, told = drop(x, p)
    mask = masked(torch.ones_like(x), told, p)
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p), dtype=dtype).item()}
    assert abs(float((mask == 0).double().mean()) - p) < 0.05
    assert torch.equal(dropped == 0, mask == 0)
    torch.testing.assert_close(dropped, masked(x, told, p))
    expected = into.double() + t.double() * mask.double()
    torch.testing.assert_close(masked(t, told, p, into=into).double(), expected, rtol=0, atol=0.02)
    assert told.numel() * told.element_size() <= x.numel() // 8 + 1
