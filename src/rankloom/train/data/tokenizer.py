"""What is asked of a tokenizer, and its plain facts: end, pad, special strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rankloom.errors import DataError


class Tokenizer(Protocol):
    """The part of transformers' fast tokenizers that is used here."""

    chat_template: Any
    eos_token: Any
    eos_token_id: Any
    bos_token: Any
    bos_token_id: Any
    pad_token_id: Any
    mask_token_id: Any
    vocab_size: int
    all_special_ids: list[int]
    is_fast: bool
    model_max_length: int
    all_special_tokens: list[str]
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: Any, **options: Any) -> Any:
        """Encode."""

    def decode(self, ids: Sequence[int], **options: Any) -> Any:
        """Back to text."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a conversation."""

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The Jinja text."""


def check_fast(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that cannot say which characters a token covers."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer, without character offsets, so the answer's tokens cannot "
            "be found; load it with AutoTokenizer.from_pretrained(…, use_fast=True)"
        )


def pad_id(tokenizer: Tokenizer) -> tuple[int, str | None]:
    """(the id to pad with, a note if it had to be chosen). Padding is masked out by position, never by this id."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id), None
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has neither a pad token nor an EOS token to pad with; set one: "
            "tokenizer.pad_token = tokenizer.unk_token, or tokenizer.add_special_tokens({'pad_token': '<pad>'}) "
            "and model.resize_token_embeddings(len(tokenizer))"
        )
    end = int(tokenizer.eos_token_id)
    return (
        end,
        f"the tokenizer has no pad token: EOS {tokenizer.eos_token!r} (id {end}) pads instead, never trained there",
    )


def specials(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The strings of all special tokens."""
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*added, *tokenizer.all_special_tokens}))


def starts_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer puts BOS before a text of its own accord."""
    head = tokenizer("")["input_ids"]
    return tokenizer.bos_token_id is not None and list(head[:1]) == [tokenizer.bos_token_id]
