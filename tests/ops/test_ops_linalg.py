"""What linear algebra has no method of its own to prove it."""

import math

import pytest
import torch

from rankloom.ops.linalg import largest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_the_largest_size_among_many_tensors(dtype):
    """Wherever it stands, whatever its sign; NaN and infinity before all."""
    tensors = [torch.rand(shape).to(dtype) for shape in ((3, 4), (5,), (0, 3), (), (2, 2, 2))]
    tensors.append(torch.rand(40))
    assert largest([]) == largest([torch.empty(0)]) == 0.0
    assert largest(tensors) == max(float(t.float().max()) for t in tensors if t.numel())
    for tensor in [t for t in tensors if t.numel()]:
        kept = tensor.clone()
        for value in (-32.0, float("inf"), float("-inf"), float("nan")):
            tensor.view(-1)[-1:] = torch.tensor([value]).to(tensor.dtype)
            found = largest(tensors)
            assert math.isnan(found) if math.isnan(value) else found == abs(value)
        tensor.copy_(kept)
    tensors[0].view(-1)[0:1], tensors[-1][0] = torch.tensor([torch.inf]).to(dtype), float("nan")
    assert math.isnan(largest(tensors))
