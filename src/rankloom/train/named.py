"""Several named streams at once: one step draws one batch from each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from rankloom.errors import SettingsError, StateError
from rankloom.train.processes import Processes
from rankloom.train.stream import Source, Stream, stream_of


class NamedStreams(Stream):
    """{name: batch of the stream}; each stream has its own order, epoch and position. `epoch` is the first one's."""

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self.streams = dict(streams)

    def next(self) -> dict[str, Any]:
        return {name: stream.next() for name, stream in self.streams.items()}

    @property
    def epoch(self) -> int | None:
        return next(iter(self.streams.values())).epoch

    def state(self) -> dict[str, Any]:
        return {"kind": "named", "streams": {name: stream.state() for name, stream in self.streams.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        saved = state.get("streams", {})
        if state["kind"] != "named" or saved.keys() != self.streams.keys():
            was = ", ".join(map(repr, saved)) or "one without a name"
            raise StateError(
                f"the checkpoint's streams are {was}, this run's {', '.join(map(repr, self.streams))}: resume with the "
                "same streams"
            )
        for name, stream in self.streams.items():
            try:
                stream.restore(saved[name])
            except StateError as error:
                raise StateError(f"the stream {name!r}: {error}") from error


def streams_of(batches: Source | Mapping[str, Source], processes: Processes, kept: bool = True) -> Stream:
    """The stream over one source, or over named ones; `kept` as in `stream_of`."""
    if not isinstance(batches, Mapping):
        return stream_of(batches, processes, kept)
    return NamedStreams({name: stream_of(source, processes, kept) for name, source in batches.items()})


def only_stream(batches: Source | Mapping[str, Source], has_loss: bool) -> Source | Mapping[str, Source]:
    """Where no loss takes streams apart, the one source. Raises `SettingsError` where there are none or several."""
    if not isinstance(batches, Mapping):
        return batches
    odd = [name for name in batches if not isinstance(name, str) or not name]
    if odd or not batches:
        raise SettingsError(
            f"batches={{…}}: name each stream, as in {{'retain': …, 'forget': …}}; {odd or 'none'} given"
        )
    if has_loss:
        return batches
    if len(batches) > 1:
        raise SettingsError(
            f"the streams {', '.join(map(repr, batches))} need a loss that reads them: loss=lambda model, streams: …, "
            "or one of rankloom.objectives such as NPO()"
        )
    return next(iter(batches.values()))


def split_streams(rows: Sequence[Any], seed: int = 0, **shares: float) -> dict[str, list[Any]]:
    """`rows` (batches, or examples for a loader) dealt out to named streams by their shares; no two have one in common.

    `split_streams(batches, lower=0.8, upper=0.2)`. Which go where is drawn with `seed`; their order stays. Raises
    `SettingsError` where the shares do not add up to 1, or leave a stream without rows.
    """
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise SettingsError(f"the shares {shares} of the streams are positive and add up to 1")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [round(end * len(rows)) for end in accumulate(shares.values())]
    parts = [sorted(drawn[begin:end]) for begin, end in zip([0, *ends], ends)]
    for name, part in zip(shares, parts):
        if not part:
            raise SettingsError(f"{len(rows)} rows leave none for the stream {name!r} with a share of {shares[name]}")
    return {name: [rows[i] for i in part] for name, part in zip(shares, parts)}
