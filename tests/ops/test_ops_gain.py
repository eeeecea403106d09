"""The magnitude's gradient, also where the output has all but forgotten the row."""

import pytest
import torch

from rankloom.ops.gain import by_norms, remembers, scaled_and_summed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_a_magnitude_that_is_zero(dtype):
    torch.manual_seed(0)
    plain, dy = torch.randn(50, 7, dtype=torch.float64).to(dtype), torch.randn(50, 7, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    magnitude, norms = torch.randn(7, dtype=wide), torch.rand(7, dtype=wide) + 0.5
    magnitude[:2] = 0
    norms[1:3] = 0
    told = remembers(dtype)
    gain, inverse = by_norms(magnitude, norms, dtype, gained=told)
    assert gain[1] == gain[2] == 1
    assert told == (dtype != torch.float16)
    y = plain * gain if told else plain
    assert not told or float(y[:, 0].abs().max()) < 1e-18
    through, total = scaled_and_summed(dy, y, gain, wide)
    found = total * inverse
    wanted = (dy.double() * plain.double()).sum(0) / norms.double()
    wanted[1:3] = 0
    # the products dy∘y are rounded to their dtype, and so is y
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=50 * torch.finfo(dtype).eps)
    torch.testing.assert_close(through, dy * gain)
