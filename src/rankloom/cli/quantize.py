"""`rankloom quantize`."""

from __future__ import annotations

from rankloom.cli.options import ArgumentsOut, Json, Out, split_out
from rankloom.cli.screen import screen, size


def quantize(arguments: ArgumentsOut = None, out: Out = None, json: Json = False) -> None:
    """Pack a model by a plan's store: `rankloom quantize model=microworld plan.store=normal_float -o small`, or with a
    method that starts from what the store loses: `method=loftq method.r=16 plan.store.bits=2`.
    """
    with screen(json) as show:
        from rankloom.jobs.opening import open_path
        from rankloom.jobs.quantize import quantize_job

        path, target, changes = split_out(arguments, out)
        found = quantize_job(open_path(path, changes).config, target)
        show.result(found.as_dict())
        rows = [("before", k) for k in found.before] + [("now", k) for k in found.kept]
        show.table(
            ("", "kept as", "tensors", "numbers", "size", "bits each"),
            [(when, k.how, k.tensors, k.weights, size(k.bytes), k.bits_per_weight) for when, k in rows],
        )
        show.facts(
            [
                ("output, against the dense model", f"relative error {found.error.relative:.3g}"),
                ("the same best token", f"{found.error.same_choice:.1%}"),
                ("measured on", found.measured_on),
                ("adapter", found.adapter),
                ("model", f"{found.out} ({size(found.size)})"),
            ]
        )
