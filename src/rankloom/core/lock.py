"""A lock that a model may carry: copies of the model, and files of it, get a fresh one."""

from __future__ import annotations

import threading
from typing import Any


class Lock:
    """`with lock:`; the thread that holds it may take it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *raised: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()
