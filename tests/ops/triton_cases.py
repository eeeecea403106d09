"""Run in a process of its own: the kernels against the references, as JSON lines; on the CPU with TRITON_INTERPRET=1,
else on a GPU."""

from __future__ import annotations

import json
import os

import torch

from rankloom.ops import gain as ops
from rankloom.ops.segments import added, segments, stack
from rankloom.ops.triton import dropout, gain
from rankloom.ops.triton import normalfloat as nf
from rankloom.ops.triton import segments as kernels
from rankloom.ops.triton.normalfloat import Code
from rankloom.store.normalfloat import NormalFloat, dynamic_code, table

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
torch.set_default_device("cpu" if INTERPRETED else "cuda")
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

BATCHES = {"mixed": [1, 0, -1, 1, 2, 3], "skewed": [0, 0, 0, 1, -1]}
HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter multiplies the bits of bfloat16 as integers
RANKS = (3, 16, 1, 20)


def say(case, made, wanted, reference):
    made, wanted = made.double(), wanted.double()
    off = float((made - wanted).abs().max() / wanted.abs().max())
    changed = float((wanted - reference.double()).abs().max()) if reference is not None else 1.0
    print(json.dumps({"case": case, "off": off, "changed": changed}))


def mixed_batches():
    for name, which in BATCHES.items():
        for tokens in (1, 19, 66):
            for dtype in (torch.float32, HALF):
                torch.manual_seed(0)
                k, d = 70, 66
                pairs = [(torch.randn(r, k), torch.randn(d, r), 0.5 + i) for i, r in enumerate(RANKS[: max(which) + 1])]
                held, found = stack(pairs, dtype), segments(which)
                x, y = torch.randn(len(which), tokens, k).to(dtype), torch.randn(len(which), tokens, d).to(dtype)
                wide = stack([(a.double(), b.double(), s) for a, b, s in pairs], torch.float64)
                if dtype != torch.float32:
                    wide = type(wide)(held.a.double(), held.b.double(), held.ranks, held.scales.double(), held.factors)
                wanted = added(y.double(), x.double(), found, wide)  # no kernel computes in float64
                made = kernels.added(y.clone(), x, found, held, 8)
                say(f"segments {name} {tokens} {dtype}", made, wanted, y)
                silent = [i for i, a in enumerate(which) if a < 0]
                assert torch.equal(made[silent], y[silent])


def gains():
    for dtype in (torch.float32, HALF):
        torch.manual_seed(0)
        y, dy, g = torch.randn(300, 130).to(dtype), torch.randn(300, 130).to(dtype), torch.randn(130).to(dtype)
        say(f"gain {dtype}", gain.scale_(y.clone(), g), y.double() * g.double(), y)
        made, total = gain.scaled_and_summed(dy, y, g)
        say(f"gain backward {dtype}", made, dy.double() * g.double(), dy)
        say(f"gain sum {dtype} float32", total, (dy.double() * y.double()).sum(0), None)


def gains_of_rows():
    for rank, out, in_, dtype in ((1, 5, 40, torch.float32), (20, 130, 300, HALF), (16, 64, 256, HALF)):
        torch.manual_seed(0)
        w, a, b = torch.randn(out, in_).to(dtype), torch.randn(rank, in_), torch.randn(out, rank)
        b[0], w[0] = 0, 0
        square, magnitude = w.float().square().sum(-1), torch.randn(out)
        magnitude[:3] = 0
        faint = ops.FAINT if dtype == torch.float32 else 2.0**-8
        wide = [t.double() for t in (w, a.to(dtype), b)]
        for gained in (False, True):
            made = gain.gain_of(w, a, b, 3.0, square, magnitude, dtype, faint, gained)
            given = (square.double(), magnitude.double(), torch.float64, gained)
            wanted, inverse = ops.gain_of(*wide, 3.0, *given)
            say(f"gain of rows {rank} {dtype}", made[0][3:], wanted[3:], None)
            say(f"inverse gain of rows {rank} {dtype}", made[1][3:], inverse[3:], None)
            assert made[0][0] == 1
            assert made[1][0] == 0
            assert torch.equal(made[0][1:3], torch.full_like(made[0][1:3], faint))


def masks():
    for dtype in (torch.float32, HALF):
        for p in (0.1, 0.5):
            torch.manual_seed(0)
            x, y = torch.randn(70, 1100).to(dtype), torch.randn(70, 1100).to(dtype)
            seed, other = torch.tensor([7]), torch.tensor([2**40 + 7])
            mask = dropout.masked(torch.ones_like(x), seed, p, None)
            gone = mask == 0
            assert abs(float(gone.double().mean()) - p) < 0.01
            assert abs(float(gone[:, 1:].eq(gone[:, :-1]).double().mean()) - (p * p + (1 - p) ** 2)) < 0.01
            assert abs(float(gone[1:].eq(gone[:-1]).double().mean()) - (p * p + (1 - p) ** 2)) < 0.01
            assert torch.equal(mask[~gone], torch.full_like(mask[~gone], 1 / (1 - p)))
            differ = (dropout.masked(torch.ones_like(x), other, p, None) == 0) != gone
            assert abs(float(differ.double().mean()) - 2 * p * (1 - p)) < 0.01
            kept = (~gone).double() / (1 - p)
            say(f"masked {p} {dtype}", dropout.masked(x, seed, p, None), x.double() * kept, x)
            added_to = dropout.masked(x, seed, p, y.clone())
            say(f"masked into {p} {dtype}", added_to, y.double() + x.double() * kept, y)


def packed_weights():
    for shape, block, double in (
        ((40, 64), 64, False),
        ((33, 71), 16, True),
        ((64, 128), 64, True),
        ((5, 320), 64, True),
    ):
        for dtype in (torch.float32, HALF):
            torch.manual_seed(0)
            store = NormalFloat(bits=4, block=block, double=double, double_block=8)
            weight = store.pack(torch.randn(shape))
            code = Code(table(4, weight.device), block, torch.tensor(dynamic_code()), store.double_block)
            parts = {name: part.cpu() for name, part in weight.parts.items()}
            plain = store.decode(parts, weight.shape, dtype)
            assert torch.equal(nf.decoded(weight.parts, weight.shape, code, dtype).cpu(), plain)
            for rows in ((1, 2), (1,), (3,)):
                x = torch.randn(*rows, shape[1]).to(dtype)
                made = nf.product(x, weight.parts, weight.shape, code)
                if rows == (3,) or shape[1] % block:
                    assert made is None
                    continue
                wanted = x.double().cpu() @ plain.double().mT
                say(f"normalfloat {shape} {block} {double} {rows} {dtype}", made.cpu(), wanted, None)


if __name__ == "__main__":
    mixed_batches()
    gains()
    gains_of_rows()
    masks()
    packed_weights()
