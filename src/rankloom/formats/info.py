"""What an adapter folder holds, without a model."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankloom.formats.limits import Limits
from rankloom.formats.loading import reader_of
from rankloom.formats.manifest import Source, open_folder


@dataclass(frozen=True)
class Info:
    """`format` "peft" or "rankloom"; `plan`: as data, for folders of ours; `verified`: digests are those of saving."""

    folder: Path
    format: str
    peft_type: str
    base: str | None
    config: dict[str, Any]
    plan: dict[str, Any] | None
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    verified: bool


def inspect(folder: str | Path, *, limits: Limits | None = None) -> Info:
    """Read and check config, header and manifest of an adapter folder. Raises `FileError`."""
    with open_folder(folder, limits) as source:
        source.verify()
        return _info(source)


def _info(source: Source) -> Info:
    reader = reader_of(source)
    native = reader.peft_type == "RANKLOOM"
    base = source.config.get("base_model_name_or_path")
    dtypes = Counter(str(h.dtype).removeprefix("torch.") for h in source.header.values())
    return Info(
        folder=source.folder,
        format="rankloom" if native else "peft",
        peft_type=reader.peft_type,
        base=base if isinstance(base, str) else None,
        config=source.config,
        plan=source.plan or (source.config.get("plan") if native else None),
        tensors=len(source.header),
        parameters=sum(math.prod(h.shape) for h in source.header.values()),
        bytes=source.size,
        dtypes=dict(dtypes),
        verified=source.verified,
    )
