"""A job in forked processes that are sent signals, and how they ended."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

SECONDS = 60.0
"""After which processes that work together are killed."""


@dataclass(frozen=True)
class Process:
    """A running child."""

    pid: int

    def send(self, number: int) -> None:
        """Send it a signal, if it is still there to be told."""
        os.kill(self.pid, number)

    def end(self, seconds: float) -> int | None:
        """Its exit code as a shell shows it (128 + the signal that killed it), or None: it had to be killed."""
        limit = time.perf_counter() + seconds
        while time.perf_counter() < limit:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return None


def start(job: Callable[[], object]) -> Process:
    """Fork; the child runs `job` with the system's own signal handlers and exits as a program would."""
    pid = os.fork()
    if pid:
        return Process(pid)
    code = 1
    try:
        warnings.simplefilter("ignore")
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        job()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def together(
    count: int, job: Callable[[], object], then: Callable[[Sequence[Process]], object] = lambda each: None
) -> list[int | None]:
    """Exit codes of `count` forked processes that do `job`, joined as a launcher joins them.

    `then` is called with them once they have joined. One that loses the others must end by itself: None if it did not.
    """
    joined, into = os.pipe()
    with tempfile.NamedTemporaryFile() as meeting, os.fdopen(joined, "rb") as arrivals:
        each = [start(partial(_joined, job, rank, count, meeting.name, into)) for rank in range(count)]
        os.close(into)
        arrivals.read(count)
        then(each)
        return [process.end(SECONDS) for process in each]


def _joined(job: Callable[[], object], rank: int, count: int, meeting: str, into: int) -> None:
    if count > 1:
        ranks, sizes = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")
        os.environ |= {
            **dict.fromkeys(ranks, str(rank)),
            **dict.fromkeys(sizes, str(count)),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    os.write(into, b".")
    job()
