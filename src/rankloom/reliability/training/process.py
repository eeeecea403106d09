"""A job in a forked process that is sent signals, and how it ended."""

from __future__ import annotations

import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass


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
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
