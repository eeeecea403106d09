"""The journal: what was folded into the base, in order, as changes. The same base is brought to the same place by it.

A fold is the application of its entry, so doing it again on the same base gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rankloom.core.site import LAYER
from rankloom.errors import StateError

Into = Literal["dense", "store"]
"""What a packed weight becomes when a change is added: dense, or kept in its store."""


class Pair(NamedTuple):
    """scale · B A: `A` (…, r, in), `B` (…, out, r)."""

    scale: float
    A: Tensor
    B: Tensor

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """The thin factors A and B, if it has any."""
        return self.A, self.B

    @property
    def replaces(self) -> bool:
        """Whether the tensor as it was does not count."""
        return False

    def added(self, matrix: Tensor) -> Tensor:
        """The matrix (…, out, in) with the change."""
        a, b = self.A.to(matrix), self.B.to(matrix)
        if matrix.ndim == 2:
            return torch.addmm(matrix, b, a, alpha=self.scale)
        return torch.add(matrix, b @ a, alpha=self.scale)


class Delta(NamedTuple):
    """scale · `change`, of the shape of the matrix, or of a bias."""

    scale: float
    change: Tensor

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """The thin factors A and B, if it has any."""
        return None

    @property
    def replaces(self) -> bool:
        """Whether the tensor as it was does not count."""
        return False

    def added(self, matrix: Tensor) -> Tensor:
        """The matrix or bias with the change."""
        return torch.add(matrix, self.change.to(matrix), alpha=self.scale)


class Value(NamedTuple):
    """The tensor itself, `value`; `scale` is 1."""

    scale: float
    value: Tensor

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """The thin factors A and B, if it has any."""
        return None

    @property
    def replaces(self) -> bool:
        """Whether the tensor as it was does not count."""
        return True

    def added(self, matrix: Tensor) -> Tensor:
        """The value in the place of the tensor."""
        return self.value.to(matrix, copy=True)


Term = Pair | Delta | Value
TERMS: Mapping[str, type[Pair] | type[Delta] | type[Value]] = {"pair": Pair, "delta": Delta, "value": Value}


@dataclass(frozen=True)
class Edit:
    """What a fold does to one tensor: `path` of its layer; `slot` "layer" for the layer's matrix, else the name of a
    parameter or buffer; `terms` add up in order. `parts`: those of a packed weight that took the change without loss.
    """

    path: str
    slot: str
    terms: tuple[Term, ...]
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the site, as `Site.name`."""
        return self.path if self.slot == LAYER else ".".join(filter(None, (self.path, self.slot)))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor) of all that it holds."""
        for i, term in enumerate(self.terms):
            yield from ((f"{i}.{key}", value) for key, value in term._asdict().items() if key != "scale")
        yield from ((f"part.{key}", part) for key, part in self.parts.items())

    def kept(self) -> Edit:
        """A copy whose tensors are its own, contiguous and on the CPU."""
        terms = tuple(type(t)(t.scale, *map(_own, t[1:])) for t in self.terms)
        return replace(self, terms=terms, parts={k: _own(p) for k, p in self.parts.items()})


@dataclass(frozen=True)
class Fold:
    """The edits of one fold, and what it did to packed weights."""

    edits: tuple[Edit, ...]
    into: Into

    def kept(self) -> Fold:
        """A copy whose tensors are its own."""
        return replace(self, edits=tuple(edit.kept() for edit in self.edits))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by place in the fold."""
        return {f"{i}.{key}": tensor for i, edit in enumerate(self.edits) for key, tensor in edit.tensors()}

    def row(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON values."""
        return {"into": self.into, "edits": [_row(edit) for edit in self.edits]}

    def same(self, other: Fold) -> bool:
        """Whether it is the same fold, bit for bit."""
        mine, theirs = self.tensors(), other.tensors()
        return self.row() == other.row() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@dataclass
class Journal:
    """The `folds` of a bank, in order. `base`: fingerprint of the base before the first of them."""

    folds: list[Fold] = field(default_factory=list)
    base: dict[str, Any] | None = None

    FIELDS: ClassVar = frozenset({"base", "folds", "tensors"})

    def __len__(self) -> int:
        return len(self.folds)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that were changed."""
        return tuple(dict.fromkeys(edit.name for fold in self.folds for edit in fold.edits))

    def continues(self, other: Journal) -> bool:
        """Whether it is `other`, or `other` and more."""
        return len(self) >= len(other) and all(mine.same(theirs) for mine, theirs in zip(self.folds, other.folds))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, by place in the journal."""
        return {f"{i}.{key}": tensor for i, fold in enumerate(self.folds) for key, tensor in fold.tensors().items()}

    def rows(self) -> list[dict[str, Any]]:
        """Everything but tensors and fingerprint, as JSON values."""
        return [fold.row() for fold in self.folds]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"base": self.base, "folds": self.rows(), "tensors": self.tensors()}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Journal:
        """The journal that gave this `state`. Raises `StateError` where it is none."""
        try:
            folds = [_fold(row, f"{i}", state["tensors"]) for i, row in enumerate(state["folds"])]
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"this is no journal of folds: {type(error).__name__}: {error}") from error
        return cls(folds, state["base"])


def keys_of(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Edit, str, str]]:
    """(key, edit without tensors, kind of term or "part", field) of every tensor of a journal with these rows.

    Raises `KeyError`, `TypeError` or `ValueError` where the rows are not a journal's.
    """
    for f, row in enumerate(rows):
        _check(row, {"edits", "into"})
        if row["into"] not in ("dense", "store"):
            raise ValueError(f"into={row['into']!r}")
        for e, edit in enumerate(row["edits"]):
            _check(edit, {"parts", "path", "slot", "terms"})
            bare = Edit(str(edit["path"]), str(edit["slot"]), ())
            for t, (kind, scale) in enumerate(edit["terms"]):
                if type(scale) not in (int, float):
                    raise ValueError(f"scale {scale!r}")
                for name in TERMS[kind]._fields[1:]:
                    yield f"{f}.{e}.{t}.{name}", bare, kind, name
            for name in edit["parts"]:
                yield f"{f}.{e}.part.{name}", bare, "part", str(name)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _row(edit: Edit) -> dict[str, Any]:
    kinds = {cls: kind for kind, cls in TERMS.items()}
    return {
        "path": edit.path,
        "slot": edit.slot,
        "terms": [[kinds[type(term)], term.scale] for term in edit.terms],
        "parts": sorted(edit.parts),
    }


def _check(row: Any, fields: set[str]) -> None:
    if not isinstance(row, dict) or row.keys() != fields:
        raise ValueError(f"{row!r:.80} has not the fields {', '.join(sorted(fields))}")


def _fold(row: Mapping[str, Any], at: str, tensors: Mapping[str, Tensor]) -> Fold:
    return Fold(tuple(_edit(e, f"{at}.{i}", tensors) for i, e in enumerate(row["edits"])), row["into"])


def _edit(row: Mapping[str, Any], at: str, tensors: Mapping[str, Tensor]) -> Edit:
    terms = tuple(_term(kind, scale, f"{at}.{i}", tensors) for i, (kind, scale) in enumerate(row["terms"]))
    return Edit(row["path"], row["slot"], terms, {name: _own(tensors[f"{at}.part.{name}"]) for name in row["parts"]})


def _term(kind: str, scale: float, at: str, tensors: Mapping[str, Tensor]) -> Term:
    cls = TERMS[kind]
    return cls(scale, *(_own(tensors[f"{at}.{name}"]) for name in cls._fields[1:]))
