"""Tokens hidden from a masked language model, which is to find them (BERT, arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

import torch

from rankloom.errors import DataError, SettingsError
from rankloom.train.data.examples import Example
from rankloom.train.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Masking:
    """Of the tokens that may be trained a share `rate` is chosen, one at least, and is what the model has to find.

    Of the chosen 80 % become `mask_id`, 10 % any of the `vocabulary` ids, 10 % stay.
    """

    mask_id: int
    vocabulary: int
    rate: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise SettingsError(f"rate={self.rate}: above 0, at most 1")

    def __call__(self, example: Example, generator: torch.Generator) -> Example:
        """The example with its tokens hidden; the same for the same generator."""
        ids = torch.tensor(example.ids, dtype=torch.int64)
        allowed = torch.tensor(list(example.trained), dtype=torch.bool)
        draw = torch.rand(3, len(ids), generator=generator)
        chosen = allowed & (draw[0] < self.rate)
        if not chosen.any():
            chosen[int(draw[0].masked_fill(~allowed, 2.0).argmin())] = True
        shown = torch.where(chosen & (draw[1] < 0.8), self.mask_id, ids)
        random = torch.randint(self.vocabulary, ids.shape, generator=generator)
        shown = torch.where(chosen & (draw[1] >= 0.9), random, shown)
        return replace(example, ids=array("i", shown.tolist()), trained=bytes(chosen.tolist()), targets=example.ids)


def masking(tokenizer: Tokenizer) -> Masking:
    """The masking that a tokenizer's mask token allows. Raises `DataError` where it has none."""
    if tokenizer.mask_token_id is None:
        raise DataError(
            "the tokenizer has no mask token, so a masked language model cannot be trained with it: set "
            "tokenizer.mask_token to the one of the model's vocabulary"
        )
    return Masking(int(tokenizer.mask_token_id), int(tokenizer.vocab_size))
