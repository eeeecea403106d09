"""The contract that every method keeps, as named checks: for the methods of this library and for your own.

for check in rankloom.testing.checks(MyMethod(r=4), make, run, batches):
    check()                                                # AssertionError says what is broken, where, by how much
print(rankloom.testing.check_method(MyMethod(r=4), make, run, batches))              # the whole table
rankloom.testing.count(MyMethod(r=4), 4_194_304, make_big)()               # parameters, on the meta device
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from rankloom.core.method import Method
from rankloom.core.plan import Plan, as_plan
from rankloom.testing import compiled, effects, inside, kinds, learning, matrix, portability, several_adapters, start
from rankloom.testing.check import Check, Promise, Report, Row, report
from rankloom.testing.size import count
from rankloom.testing.subject import Subject, Unfit, check_fit

PROMISES: dict[str, Promise] = {
    "identity": start.identity,
    "repeats": start.repeats,
    "reached": start.reached,
    "base_only": start.base_only,
    "base": start.base,
    "detach": start.detached,
    "independence": start.independence,
    "merge": matrix.merge,
    "unmerge": matrix.unmerge,
    "delta": matrix.delta,
    "thin": matrix.thin,
    "stacked": kinds.stacked,
    "fold": matrix.fold,
    "frozen": learning.frozen,
    "gradients": learning.gradients,
    "learns": learning.learns,
    "checkpointing": learning.checkpointing,
    "penalty": learning.penalty,
    "resume": learning.resume,
    "fold_resume": learning.fold_resume,
    "settings": portability.settings,
    "settings_matter": effects.settings_matter,
    "save_load": portability.save_load,
    "state": portability.state,
    "copies": portability.copies,
    "pickles": portability.pickles,
    "moves": portability.moves,
    "bf16": portability.bf16,
    "autocast": portability.autocast,
    "compile": compiled.compile,
    "recompiles": compiled.recompiles,
    "adds": several_adapters.adds,
    "weights": several_adapters.weights,
    "switching": several_adapters.switching,
    "rows": several_adapters.rows,
    "rows_tensor": several_adapters.rows_tensor,
    "threads": several_adapters.threads,
    "inside_dora": inside.inside_dora,
    "inside_mixture": inside.inside_mixture,
    "context": inside.context,
}
NAMES = (*PROMISES, *(f"kind_{name}" for name in kinds.CASES))
"""Names of all checks, in the order of `checks`."""


def checks(
    method: Method | Plan,
    make: Callable[[], nn.Module],
    run: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    *,
    steps: int = 40,
    lr: float = 2e-2,
    tolerance: float | None = None,
    **plan: Any,
) -> list[Check]:
    """The contract of `method` as named checks; call each one.

    Args:
        method: a method, or a plan.
        make: a fresh model, the same at every call; small.
        run: the output (batch, …) of a model for a batch, in floating point.
        batches: a few batches (tensor, mapping or tuple) of at least 2 rows, batch first; 4 rows are better.
        steps, lr: of the training that must learn a planted change.
        tolerance: largest relative difference of two computations of the same thing; default 2000 units in the last
            place of the output's dtype (float32: 2.4e-4, float64: 4.4e-13), and at least 4 of the plan's `dtype`.
        plan: changes of the plan, such as `target_modules=["q_proj"]`.

    Raises:
        Unfit: the model, not the method, cannot carry the contract.
    """
    from rankloom.train.rng import untouched_rng

    wanted = replace(as_plan(method, plan), start=None)
    subject = Subject(wanted, make, run, tuple(batches), steps, lr, tolerance)
    with untouched_rng():
        check_fit(subject)
    name = type(subject.plan.method).__name__
    found = [Check(each, _line(body), partial(body, subject), name) for each, body in PROMISES.items()]
    line = _line(kinds.kind)
    return found + [Check(f"kind_{k}", line, partial(kinds.kind, k, subject), name) for k in kinds.CASES]


def check_method(
    method: Method | Plan,
    make: Callable[[], nn.Module],
    run: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],
    **settings: Any,
) -> Report:
    """Call every check of `checks`; the table of what held and what did not, with `.ok` and `.failed`."""
    found = checks(method, make, run, batches, **settings)
    return report(found[0].method, found)


def _line(body: Callable[..., None]) -> str:
    return (body.__doc__ or "").splitlines()[0]


__all__ = ["NAMES", "Check", "Report", "Row", "Unfit", "check_method", "checks", "count"]
