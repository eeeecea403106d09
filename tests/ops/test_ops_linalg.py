"""What linear algebra has no method of its own to prove it."""

import math

import pytest
import torch

from rankloom.ops.linalg import largest, largest_norm

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2]


def tensors(dtype):
    made = [torch.rand(shape).to(dtype) for shape in ((3, 4), (5,), (0, 3), (), (2, 2, 2))]
    return [*made, torch.rand(40)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_size(dtype):
    """Wherever it stands, whatever its sign; NaN and infinity before all."""
    for tensor in tensors(dtype):
        if not tensor.numel():
            assert largest(tensor) == 0.0
            continue
        assert largest(tensor) == float(tensor.float().max())
        for value in (-32.0, float("inf"), float("-inf"), float("nan")):
            tensor.view(-1)[-1:] = torch.tensor([value]).to(tensor.dtype)
            found = largest(tensor)
            assert math.isnan(found) if math.isnan(value) else found == abs(value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_norm_among_many_tensors_is_no_less_than_any_value(dtype):
    many = tensors(dtype)
    assert largest_norm([]) == largest_norm([torch.empty(0)]) == 0.0
    wanted = max(float(t.double().norm()) for t in many)
    assert largest_norm(many) == pytest.approx(wanted, rel=1e-6)
    assert largest_norm(many) >= max(map(largest, many))
    for tensor in [t for t in many if t.numel()]:
        kept = tensor.clone()
        for value in (-32.0, float("inf"), float("-inf"), float("nan")):
            tensor.view(-1)[-1:] = torch.tensor([value]).to(tensor.dtype)
            found = largest_norm(many)
            assert math.isnan(found) if math.isnan(value) else found >= abs(value)
        tensor.copy_(kept)
    many[0].view(-1)[0:1], many[-1][0] = torch.tensor([torch.inf]).to(dtype), float("nan")
    assert math.isnan(largest_norm(many))
