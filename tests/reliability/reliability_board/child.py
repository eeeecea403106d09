"""A job in a forked child with limits of time and memory: whatever a file does to it, the board goes on."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How a child ended: `value` (JSON), or `died`: "hang", "signal 9", "exit 3", or a traceback.

    `seconds` until its answer, `memory`: bytes by which its resident peak grew.
    """

    value: Any
    died: str | None
    seconds: float
    memory: int


def forked(job: Callable[[], Any], seconds: float = 10.0, memory: int | None = None, cpu: int | None = None) -> Outcome:
    """Run `job` in a forked child, which is killed after `seconds` by the clock, or `cpu` seconds of work.

    `memory`: bytes it may map beyond the parent's.

    The answer of `job` must be JSON. An exception of it is a death: the traceback is in `died`.
    """
    out, into = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(out)
        _be_child(job, into, memory, cpu)
    os.close(into)
    raw = _read(out, start + seconds)
    took = time.perf_counter() - start
    if raw is None:
        os.kill(child, signal.SIGKILL)
    _, status, _ = os.wait4(child, 0)
    if raw is None:
        return Outcome(None, "hang", took, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return Outcome(None, "hang", took, 0)
    if code or not raw:
        return Outcome(None, f"signal {-code}" if code < 0 else f"exit {code}", took, 0)
    answer = json.loads(raw)
    return Outcome(answer.get("value"), answer.get("error"), answer["seconds"], answer["memory"])


def _be_child(job: Callable[[], Any], into: int, memory: int | None, cpu: int | None) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        before = _peak_reset()
        if cpu is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
        if memory is not None:
            room = _mapped() + memory
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
        start = time.perf_counter()
        try:
            answer: dict[str, Any] = {"value": job()}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answer |= {"seconds": time.perf_counter() - start, "memory": max(0, _peak() - before)}
        with os.fdopen(into, "wb") as file:
            file.write(json.dumps(answer).encode())
        code = 0
    finally:
        os._exit(code)


def _read(handle: int, deadline: float) -> bytes | None:
    """Everything the child writes, or None if it is not done by then."""
    found = b""
    try:
        while True:
            left = deadline - time.perf_counter()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                return None
            part = os.read(handle, 1 << 16)
            if not part:
                return found
            found += part
    finally:
        os.close(handle)


def _peak_reset() -> int:
    """Forget the peak inherited from the parent; resident bytes now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak()


def _peak() -> int:
    return _status("VmHWM")


def _mapped() -> int:
    return _status("VmSize")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
