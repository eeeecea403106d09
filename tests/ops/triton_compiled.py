"""Run in a process of its own, without TRITON_INTERPRET: every kernel compiled for GPUs that need not be there."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankloom.ops.gain import FAINT
from rankloom.ops.triton import dropout, gain, normalfloat, segments

SIZES = {"BLOCK": 64, "OUTER": 256}


def build(kernel, types, sizes, target):
    given = iter(types)
    signature = {name: "constexpr" if name in sizes else next(given) for name in kernel.arg_names}
    constants = {(kernel.arg_names.index(name),): value for name, value in sizes.items()}
    found = triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=constants), target=target)
    print(json.dumps({"kernel": kernel.__name__, "arch": target.arch, "bytes": len(found.asm["ptx"])}))


def main():
    for arch, x in ((80, "*fp32"), (90, "*bf16")):
        target = GPUTarget("cuda", arch, 32)
        for tile, piece, k in ((1, 2, 2048), (16, 16, 128), (64, 16, 128)):
            sizes = {"M": tile, "R": 16, "P": piece, "K": k}
            build(segments.shrink, [x, x, x, x, "*i32", "i32", "i32"], sizes, target)
        for tile in (16, 64):
            build(segments.expand, [x, x, x, "*i32", "i32", "i32"], {"M": tile, "R": 16, "N": 128}, target)
        tiles = {"M": gain.ROWS, "N": gain.COLUMNS}
        build(gain.scaled, [x, x, "i32", "i32"], tiles, target)
        build(gain.summed, [x, x, x, x, "*fp32", "i32", "i32"], {**tiles, "STEPS": gain.STEPS}, target)
        for rank, gained in ((16, False), (gain.WIDEST, True)):
            given = [x, "*fp32", "*fp32", "*fp32", "*fp32", x, "*fp32", "i32", "i32", "i32", "fp32"]
            sizes = {"FAINT": FAINT, "GAINED": gained, "M": gain.NORMED, "K": gain.TILE // rank, "R": rank}
            build(gain.normed, given, {**sizes, "PRECISION": "tf32x3"}, target)
        for add in (False, True):
            given = [x, "*i64", x, "i32", "i32", "fp32", "fp32"]
            build(dropout.drawn, given, {"ADD": add, "M": dropout.ROWS, "N": dropout.QUARTER}, target)
        for double in (False, True):
            parts = ["*u8", "*u8" if double else "*fp32", "*fp32", "*fp32", "*fp32", "*fp32"]
            sizes = {**SIZES, "DOUBLE": double}
            build(normalfloat.look_up, [*parts, x, "i32"], {**sizes, "K": 2048}, target)
            build(normalfloat.row_product, [x, *parts, x, "i32", "i32"], {**sizes, "N": 16, "S": 16}, target)


if __name__ == "__main__":
    main()
