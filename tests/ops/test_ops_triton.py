"""Triton kernels against their references: under the interpreter, in a process of its own."""

import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from rankloom.ops import segments as ops
from rankloom.store import normalfloat
from rankloom.store.normalfloat import NormalFloat

GAINS = ("normed", "scaled", "summed", "drawn")
CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install 'rankloom[kernels]')")
def test_kernels_equal_their_references():
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, CASES], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 50
    for case in found:
        assert case["changed"] > 0.5, case
        assert case["off"] < (1e-6 if "float32" in case["case"] else 8e-3), case


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install 'rankloom[kernels]')")
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = CASES.with_name("triton_compiled.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {case["kernel"] for case in found} == {"shrink", "expand", "look_up", "row_product", *GAINS}
    assert len(found) == 30


def test_without_a_gpu_nothing_imports_triton():
    code = (
        "import sys, torch, rankloom as rl\n"
        "from rankloom.store.normalfloat import NormalFloat\n"
        "m = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
        "for n in 'ab': bank = rl.attach(m, rl.LoRA(r=2), n, target_modules=['0'])\n"
        "bank.use(rows=['a', 'b'])\n"
        "with torch.no_grad(): m(torch.randn(2, 8))\n"
        "torch.nn.functional.linear(torch.randn(1, 64), NormalFloat().pack(torch.randn(8, 64)))\n"
        "print([n for n in sys.modules if n.split('.')[0] == 'triton'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_where_a_kernel_is_usable_it_is_used(monkeypatch):
    kernels = types.ModuleType("rankloom.ops.triton.segments")
    kernels.added = lambda y, x, found, held, most: y + 7
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr("rankloom.ops.triton.segments", kernels, raising=False)
    monkeypatch.setattr(ops, "usable", lambda *_: True)
    y, x = torch.zeros(2, 3), torch.randn(2, 4)
    held = ops.stack([(torch.randn(1, 4), torch.randn(3, 1), 1.0)], torch.float32)
    assert torch.equal(ops.added(y, x, ops.segments([0, -1]), held), y + 7)

    product = types.ModuleType("rankloom.ops.triton.normalfloat")
    product.Code = lambda *values: values
    product.product = lambda x, parts, shape, code: None if len(x) > 2 else x.new_full((len(x), shape[0]), 5.0)
    monkeypatch.setitem(sys.modules, product.__name__, product)
    monkeypatch.setattr("rankloom.ops.triton.normalfloat", product, raising=False)
    product.decoded = lambda parts, shape, code, dtype: torch.full(shape, 3.0, dtype=dtype)
    monkeypatch.setattr(normalfloat, "usable", lambda *_: True)
    weight = NormalFloat(bits=4).pack(torch.randn(6, 64))
    few, many = torch.randn(2, 64), torch.randn(3, 64)
    assert torch.equal(torch.nn.functional.linear(few, weight), torch.full((2, 6), 5.0))
    assert torch.equal(weight.unpack(), torch.full((6, 64), 3.0))
    assert torch.equal(torch.nn.functional.linear(many, weight), many @ weight.unpack().mT)
    other = NormalFloat(bits=3).pack(torch.randn(6, 64))
    assert torch.equal(torch.nn.functional.linear(few, other), few @ other.unpack().mT)


def test_kernels_are_for_cuda_tensors_only():
    from rankloom.ops.triton import usable

    assert not usable(torch.randn(2), torch.float32)
    assert not usable(torch.randn(2, device="meta"), torch.float32)
