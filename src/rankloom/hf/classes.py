"""The classifier that a model's files have: its class names by id, and whether those of the data fit them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rankloom.errors import SettingsError

UNNAMED = re.compile(r"LABEL_\d+")
CLASSIFIER = "ForSequenceClassification"
NEW = "model.head=new begins a classifier for the classes of the data"


@dataclass(frozen=True)
class Head:
    """A classifier in the files of `source`. `names`: by id, `LABEL_0` … where the model does not name its classes."""

    source: str
    names: tuple[str, ...]

    @property
    def named(self) -> bool:
        """Whether the model says what its classes are."""
        return not all(UNNAMED.fullmatch(name) for name in self.names)

    def __str__(self) -> str:
        return f"{self.source} has {_listed(self.names)}"

    def check(self, labels: Sequence[str]) -> None:
        """Refuse class names by id that mean something else to this classifier.

        Names of another set are taken for the user's own words if their number fits and none is the model's.
        """
        if len(labels) != len(self.names):
            raise SettingsError(
                f"{self}, the data has {_listed(labels)}: {NEW}; {given(self.names)} reads numbers as the model's ids"
            )
        shared = set(labels) & set(self.names)
        moved = [name for name in shared if list(labels).index(name) != self.names.index(name)]
        if moved or (shared and len(shared) < len(labels)):
            raise SettingsError(
                f"{self}, in this order; the labels given are {', '.join(labels)}: give them as the model has them, "
                f"leave data.labels out, or {NEW}"
            )


def head_of(config: Any, source: str) -> Head | None:
    """The classifier of a transformers configuration; None where its files hold none.

    Raises:
        SettingsError: `id2label` and `label2id` contradict each other, or leave ids out.
    """
    if not any(name.endswith(CLASSIFIER) for name in config.architectures or ()):
        return None
    by_id = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    by_name = {int(i): str(name) for name, i in (config.label2id or {}).items()}
    named = [names for names in (by_name, by_id) if not all(UNNAMED.fullmatch(name) for name in names.values())]
    if len(named) == 2 and by_id != by_name:
        raise SettingsError(
            f"{source}: its config.json contradicts itself: id2label is {by_id}, label2id {by_name}; mend it there"
        )
    names = named[0] if named else by_id
    if sorted(names) != list(range(len(names))):
        raise SettingsError(f"{source}: the ids of its classes are {sorted(names)}, not 0 to {len(names) - 1}")
    return Head(source, tuple(names[i] for i in range(len(names))))


def given(names: Sequence[str]) -> str:
    """Class names as an argument of the command line."""
    return f"'data.labels={json.dumps(list(names), ensure_ascii=False)}'"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"{len(names)} classes ({shown})"
