"""Text from a causal model: a prompt or a conversation in, the continuation out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankloom.errors import SettingsError
from rankloom.train.data.records import Chat, Turn, Where
from rankloom.train.data.template import choose, prompt
from rankloom.train.data.tokenizer import Tokenizer, pad_id
from rankloom.train.modes import mode
from rankloom.train.rng import untouched_rng


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen. `temperature` 0 is greedy; else sampled from the smallest set of tokens with
    probability `top_p`, the same for the same `seed`.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise SettingsError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_p={self.top_p}: "
                "1 or more, 0 or more, and above 0 up to 1"
            )


def chat_prompt(turns: Sequence[Turn], tokenizer: Tokenizer, template: str = "auto") -> str:
    """The conversation as the model sees it before it answers."""
    used, _ = choose(tokenizer, template)
    asked = Chat((*turns, Turn("assistant", "")), Where("prompt", 1))
    return prompt(asked, tokenizer, used)[0]


def continue_texts(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    decoding: Decoding | None = None,
    *,
    special: bool = False,
    batch_size: int = 16,
    stops: Sequence[int] = (),
    tell: Callable[[str], None] | None = None,
) -> list[str]:
    """The continuation of each prompt, without special tokens.

    Args:
        model: a causal model of transformers, with or without adapters; whoever is active speaks.
        special: let the tokenizer put its own BOS before the prompt (a prompt from a chat template has it already).
        batch_size: prompts per forward, padded on the left.
        stops: token ids that end an answer, beside the model's and the tokenizer's own.
        tell: is told the answer piece by piece, as it comes, where there is one prompt alone.
    """
    decoding = decoding or Decoding()
    if not callable(getattr(model, "generate", None)):
        raise SettingsError(f"{type(model).__name__} cannot generate: load it with task causal-lm")
    pad, _ = pad_id(tokenizer)
    ends = _ends(model, tokenizer, stops)
    found: list[str] = []
    with untouched_rng(), mode(model, False), torch.no_grad():
        torch.manual_seed(decoding.seed)
        for start in range(0, len(prompts), batch_size):
            ids = [_ids(text, tokenizer, special) for text in prompts[start : start + batch_size]]
            told = _Told(tokenizer, ends, tell) if tell is not None and len(prompts) == 1 else None
            new = _generate(model, ids, pad, ends, decoding, told)
            found += [_text(tokenizer, row, ends) for row in new]
    return found


class _Told:
    """What `generate` of transformers calls a streamer: hands on what the text gains by each token.

    A text that ends within a character, or in white space that may be the last, waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, ends: list[int], tell: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.tell = tell
        self.row: list[int] | None = None
        self.said = ""

    def put(self, tokens: torch.Tensor) -> None:
        """The prompt, then one token at a time."""
        if self.row is None:
            self.row = []
            return
        self.row += tokens.flatten().tolist()
        text = _text(self.tokenizer, self.row, self.ends)
        if text.startswith(self.said) and not text.endswith("\ufffd"):
            self._gain(text)

    def end(self) -> None:
        """After the last token."""
        self._gain(_text(self.tokenizer, self.row or [], self.ends))

    def _gain(self, text: str) -> None:
        if len(text) > len(self.said):
            self.tell(text[len(self.said) :])
            self.said = text


def _generate(
    model: Any, ids: list[list[int]], pad: int, ends: list[int], decoding: Decoding, told: _Told | None
) -> list[list[int]]:
    width = max(map(len, ids))
    device = next(model.parameters()).device
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device)
    if decoding.temperature > 0:
        how: dict[str, Any] = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p}
    else:
        how = {"do_sample": False, "temperature": None, "top_p": None}
    out = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        max_new_tokens=decoding.max_new_tokens,
        pad_token_id=pad,
        eos_token_id=ends or None,
        top_k=None,
        use_cache=True,
        streamer=told,
        **how,
    )
    return [[int(t) for t in row] for row in out[:, width:]]


def _ids(text: str, tokenizer: Tokenizer, special: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if not ids:
        raise SettingsError("the prompt is empty: give the model something to continue")
    return ids


def _ends(model: Any, tokenizer: Tokenizer, stops: Sequence[int]) -> list[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    every = [*(own if isinstance(own, (list, tuple)) else [own]), tokenizer.eos_token_id, *stops]
    return list(dict.fromkeys(int(e) for e in every if e is not None))


def _text(tokenizer: Tokenizer, row: list[int], ends: list[int]) -> str:
    return str(tokenizer.decode(_cut(row, ends), skip_special_tokens=True)).strip()


def _cut(row: list[int], ends: list[int]) -> list[int]:
    """The row up to its first end token."""
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
