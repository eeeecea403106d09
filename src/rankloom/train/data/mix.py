"""Several sources as one data set, mixed in ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rankloom.errors import SettingsError
from rankloom.train.data.convert import names_by_id
from rankloom.train.data.lazy import Chained
from rankloom.train.data.records import Records, fingerprint

Load = Callable[[str, Sequence[str] | None], Records]
"""The records of one source, with the class names given, if any."""


def mixed(sources: Mapping[str, float], load: Load) -> Records:
    """The records of all sources, one source after the other; `ratios`: each one's share of an epoch's rows.

    Raises:
        SettingsError: a ratio is no positive number, or the sources are of kinds that do not train together.
    """
    if not sources:
        raise SettingsError("source is empty: name one source at least, as in {train.jsonl: 1}")
    for name, ratio in sources.items():
        if not 0 < ratio < math.inf:
            raise SettingsError(f"source: the ratio of {name!r} is {ratio}: a positive number")
    parts = [load(name, None) for name in sources]
    kinds = {part.format if part.format in ("text", "classification") else "conversations" for part in parts}
    if len(kinds) > 1:
        each = ", ".join(f"{part.source} is {part.format!r}" for part in parts)
        raise SettingsError(f"these sources do not train together: {each}; give them one kind")
    if len({part.labels for part in parts}) > 1:
        names = names_by_id({name for part in parts for name in part.labels})
        parts = [load(name, names) for name in sources]
    if len(parts) == 1:
        return parts[0]
    return Records(
        items=Chained([part.items for part in parts]),
        format=parts[0].format,
        source=" + ".join(part.source for part in parts),
        labels=parts[0].labels,
        unused=tuple(sorted({name for part in parts for name in part.unused})),
        digest=fingerprint(*(part.digest for part in parts)),
        parts=tuple(map(len, parts)),
        ratios=tuple(sources.values()),
    )
