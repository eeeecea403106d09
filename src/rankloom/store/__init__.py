"""How a frozen weight is kept; `dense` is the only way any other room reads one."""

from rankloom.store.base import dense

__all__ = ["dense"]
