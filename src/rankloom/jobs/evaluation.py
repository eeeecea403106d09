"""How good a model is on held-out data: loss, perplexity, accuracy of a classifier, exact match of greedy answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rankloom.hf.generate import Decoding, continue_texts
from rankloom.train.causal import check_causal
from rankloom.train.data import Batches, Chat, Masking, Prepared, choose, prompt
from rankloom.train.evaluate import mean_loss
from rankloom.train.loss import Loss, Terms, default_loss, move
from rankloom.train.modes import mode
from rankloom.train.processes import Processes
from rankloom.train.run import TrainRun

MOST = 700.0
"""Largest loss whose exponential is still a number."""


@dataclass(frozen=True)
class Answer:
    """A question with the answer expected and the one given."""

    prompt: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """The same text, white space at the ends aside."""
        return self.given.strip() == self.expected.strip()


@dataclass
class Evaluator:
    """`evaluator(model)` → `loss` with `perplexity` or `accuracy`, and `exact_match` (0 to 1) over conversations, with
    the numbers of `examples` and of `answers` that they are taken over.

    `answers`: of the last call; `history`: of every call. Labels count, not batches, so the loss is that of one batch.
    """

    prepared: Prepared
    tokenizer: Any
    batch_size: int = 8
    most_answers: int | None = 50
    answer_tokens: int = 128
    template: str = "auto"
    loss: Loss = default_loss
    masking: Masking | None = None
    processes: Processes = field(default_factory=Processes)
    history: list[tuple[Answer, ...]] = field(default_factory=list)

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Of the last call."""
        return self.history[-1] if self.history else ()

    @property
    def scope(self) -> str:
        """What is judged, in words."""
        answers = len(self._asked())
        return f"{len(self.prepared)} examples" + (f" and the answers to {answers} of them" if answers else "")

    def __call__(self, model: Any) -> dict[str, float]:
        with mode(model, False), torch.no_grad():
            run = TrainRun(model, 1, device=next(model.parameters()).device)
            batches = Batches(self.prepared, self.batch_size, shuffle=False, masking=self.masking)
            check_causal(model, batches)
            found = {"loss": mean_loss(batches, run, self.loss, Terms(model), self.processes)}
            if self.prepared.labels:
                found["accuracy"] = self._accuracy(model, batches, run.device)
            else:
                found["perplexity"] = math.exp(min(found["loss"], MOST))
        answers = self._answers(model)
        self.history.append(answers)
        if answers:
            found["exact_match"] = sum(a.right for a in answers) / len(answers)
        found["examples"] = len(self.prepared)
        return {**found, "answers": len(answers)} if answers else found

    def _accuracy(self, model: Any, batches: Batches, device: torch.device) -> float:
        right = 0
        for number in range(len(batches)):
            batch = move(batches.batch_at(number), device)
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
        return right / len(self.prepared)

    def _answers(self, model: Any) -> tuple[Answer, ...]:
        chats = self._asked()
        if not chats:
            return ()
        used, _ = choose(self.tokenizer, self.template)
        asked = [prompt(chat, self.tokenizer, used) for chat in chats]
        given = continue_texts(
            model,
            self.tokenizer,
            [text for text, _ in asked],
            Decoding(max_new_tokens=self._room([answer for _, answer in asked])),
            stops=self.stops(),
        )
        return tuple(Answer(_question(chat), expected, g) for chat, (_, expected), g in zip(chats, asked, given))

    def _asked(self) -> list[Chat]:
        return [r for r in self.prepared.records if isinstance(r, Chat)][: self.most_answers]

    def _room(self, answers: Sequence[str]) -> int:
        """Tokens that the longest expected answer needs, with some to spare, at most `answer_tokens`."""
        longest = max(len(self.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers)
        return min(longest + 8, self.answer_tokens)

    def stops(self) -> list[int]:
        """The special token that ends the first trained answer, if one does."""
        example = self.prepared[0]
        last = max((i for i, t in enumerate(example.trained) if t), default=None)
        special = set(self.tokenizer.all_special_ids)
        return [example.ids[last]] if last is not None and example.ids[last] in special else []


def _question(chat: Chat) -> str:
    """What the user asked last."""
    return next((turn.content for turn in reversed(chat.messages) if turn.role == "user"), "")
