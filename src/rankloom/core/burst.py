"""A burst of new objects: Python's cycle collector waits until it is over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def burst() -> Iterator[None]:
    """Hold the collector back inside the block, as a decorator too: thousands of new modules, all of them in use, make
    it walk the whole heap again and again. Left switched off where it was off before.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
