"""`rankloom limits`."""

from __future__ import annotations

from rankloom.cli.options import Json
from rankloom.cli.screen import screen


def limits(json: Json = False) -> None:
    """How large an adapter folder may be before it is refused; `load(…, limits=Limits(rank=8192))` changes one."""
    with screen(json) as out:
        from rankloom.formats.limits import table

        rows = table()
        out.result({name: value for name, value, _ in rows})
        out.table(("limit", "largest", "of"), rows)
