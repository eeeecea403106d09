"""Runs in processes of their own, to be killed: one process imports everything and forks one for each run.

A process that ever ran a backward pass cannot fork one that does, so the tests' own process cannot do it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any


class Forks:
    """The other end of `serve`."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.ask("ready")

    def ask(self, what: str, **values: Any) -> Any:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps({"what": what, **values}), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, out: Path, terminal: str | None = None, after: int = 3, **settings: Any) -> int:
        """Process id of a run into `out` that has done `after` steps since it began or was resumed."""
        mark = out.with_name(f"{out.name}.begun")
        mark.unlink(missing_ok=True)
        pid = self.ask("start", out=str(out), terminal=terminal, mark=str(mark), after=after, settings=settings)
        end = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < end
            time.sleep(0.005)
        return int(pid)

    def code(self, pid: int) -> int:
        """Exit code; negative for a signal that nobody heard."""
        return int(self.ask("wait", pid=pid))

    def close(self) -> None:
        self.server.kill()
        self.server.communicate()


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _warm()
    for line in sys.stdin:
        said = json.loads(line)
        if said["what"] == "start":
            answer = os.fork()
            if answer == 0:
                _run(Path(said["out"]), said["terminal"], Path(said["mark"]), said["after"], said["settings"])
        elif said["what"] == "wait":
            answer = os.waitstatus_to_exitcode(os.waitpid(said["pid"], 0)[1])
        else:
            answer = 0
        print(answer, flush=True)


def _warm() -> None:
    """Import all that a run imports, without a backward pass."""
    import torch
    import torch._dynamo
    import train_world

    from rankloom.train import fit
    from rankloom.train.engine import accelerator

    with accelerator(torch.device("cpu"), train_world.settings()) as engine:
        fit.processes_of(engine)
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight]).step()


def _run(out: Path, terminal: str | None, mark: Path, after: int, chosen: dict[str, Any]) -> None:
    from train_world import attached, mlp, points, settings

    import rankloom as rl
    from rankloom.core.plan import Plan
    from rankloom.train.fit import fit

    os.setsid()
    handle = os.open(terminal or os.devnull, os.O_RDWR)  # the first terminal that a session opens is its own
    for number in range(3):
        os.dup2(handle, number)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    done: list[int] = []

    def tell(row: Any) -> None:
        if row["event"] == "train":
            done.append(row["step"])
            time.sleep(0.005)
        if len(done) == after or row["event"] == "end":
            mark.touch()

    code: Any = 0
    try:
        model = attached(mlp, {"default": Plan(rl.LoRA(r=2, lora_dropout=0.1))}, 1)
        fit(model, points(), settings=settings(accumulate=1, **chosen), out=out, resume="auto", report=tell)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


if __name__ == "__main__":
    serve()
