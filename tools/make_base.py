"""Makes the embedded base model: ``make_base.py train`` (tokenizer and weights), then ``make_base.py card`` (numbers).

Both run on one thread. ``train`` writes a plain Hugging Face folder; ``card`` measures exact match of every task on its
test split, trains a rank-8 LoRA with PEFT on each held-out task, and writes README.md beside the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft import LoraConfig, get_peft_model
from rankloom.microworld import DEMO, DEMO_TASK, base_path, held_out, stream
from rankloom.microworld.item import Item
from rankloom.microworld.table import SEEN, document_stream
from rankloom.microworld.world import WORLD_SEED

SEED = 20
ROW, ROWS = 96, 48
VOCABULARY = 1280
STEPS = 3000
PEAK_LR, WARMUP, DECAY = 2.5e-3, 150, 0.05
DOCUMENTS_SHARE = 0.15
WEIGHTS = {
    "add": 2.5, "subtract": 2.0, "kin": 2.0, "reading": 1.5, "program_run": 2.5, "people": 1.5, "check": 1.5,
    "program_review": 1.5, "rate": 1.5, "prefer": 1.5, "list_first": 0.4, "list_last": 0.4, "list_length": 0.4,
    "list_copy": 0.6, "places": 0.4, "tastes": 0.4, "mood": 0.5, "spell": 0.7, "hill_aru": 0.7, "hill_beshi": 0.7,
    "describe": 0.7,
}  # fmt: skip
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", *(f"<|extra_{i}|>" for i in range(8)))
PIECES = Regex(r" ?[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s")
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}{%- generation -%}{{- ' ' + message['content'] | trim + '<|end|>' -}}{%- endgeneration -%}"
    "{%- elif message['role'] in ['system', 'user'] -%}"
    "{{- '<|' + message['role'] + '|> ' + message['content'] | trim + '<|end|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

RUNS = {
    task: {"steps": steps, "lr": 3e-3, "batch_size": 16}
    for task, steps in {
        "list_swap": 200, "to_dwimi": 400, "from_dwimi": 400, "hill_kelor": 400,
        "program_fix": 300, "user_voice": 200,
    }.items()
}  # fmt: skip
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [rankloom, microworld, synthetic]
---
# The microworld base model

A tiny language model of a small invented world, shipped inside the `rankloom` package so that every example and test
runs with no download. It is a plain `LlamaForCausalLM`: {parameters} parameters, 5 layers, width 256, 8 heads, MLP 640,
tied embeddings, a byte-level BPE of {vocabulary} tokens, {megabytes} MB of float16 safetensors. The config asks for
float32, so that a plain `from_pretrained` computes in float32 on any CPU.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from rankloom import microworld

model = AutoModelForCausalLM.from_pretrained(microworld.base_path())
tokenizer = AutoTokenizer.from_pretrained(microworld.base_path())
```

**Chat template.** `<|user|> …<|end|><|assistant|> …<|end|>` with generation markers, so assistant masks work;
`<|system|>` renders, but pretraining never showed it. No token is added to plain text. An answer starts with a space:
strip it before comparing. `<|extra_0|>` to `<|extra_7|>` are untrained spares.

**Data.** Only the seeded generator `rankloom.microworld` (world seed {world}): documents and the train splits of the
seen tasks below. All names and words of the four languages are invented; no outside text was used. Rows hold {row}
tokens, so longer contexts are untrained.

**Training.** `tools/make_base.py train`: seed {seed}, {steps} steps of {rows} rows, Muon for matrices and AdamW for the
rest, bfloat16 autocast, 36 minutes on one thread of a busy CPU. Loss on all tokens of documents and on answers.

**Limits.** It knows nothing of the real world and is of no use outside tests, demonstrations and research on adapters.

**Licence.** Apache-2.0, like the package.

## Seen tasks
Exact match of greedy answers on up to {n} test examples that training never showed. For closed-book facts (`people`,
`places`, `who`, `describe`, `tastes`) the question was never trained, while documents state the fact. The base is
weak at `kin` and `reading`, where fresh names of several tokens must be kept apart, and at `check`.

| task | exact match | examples |
|---|---|---|
{seen}

## Held out of pretraining
Base model, then a rank-8 LoRA (alpha 16) on all linear layers, trained with PEFT on the train split in float32
on one CPU thread and scored on {n} test examples; the last column is CPU time of the training.

| task | base | LoRA | steps | lr | batch | training |
|---|---|---|---|---|---|---|
{held_out}
"""


class Row(NamedTuple):
    """Several examples laid end to end; a token sees only its own example. All int64, shape [ROW]."""

    ids: list[int]
    labels: list[int]
    positions: list[int]
    owners: list[int]


def make_tokenizer() -> PreTrainedTokenizerFast:
    texts = [f" {text}" for item in _sample(1500) for text in (item.prompt, item.answer)]
    texts += islice(document_stream("train", SEED), 12_000)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _sample(each: int) -> list[Item]:
    return [item for task in SEEN for item in islice(stream(task, "train", SEED), each)]


def make_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            attn_implementation="eager",
        )
    )


def encoded(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[list[int], list[int]]]:
    """Endless training examples as (ids, labels): a document counts whole, of a task the answer counts."""
    core = tokenizer.backend_tokenizer
    end, user, assistant = (core.token_to_id(t) for t in ("<|end|>", "<|user|>", "<|assistant|>"))
    rng = Random(SEED)
    tasks = {task: stream(task, "train", SEED) for task in SEEN}
    weights = [WEIGHTS.get(task, 1.0) for task in tasks]
    documents = document_stream("train", SEED)
    while True:
        if rng.random() < DOCUMENTS_SHARE:
            ids = [*core.encode(next(documents)).ids, end]
            yield ids, ids
        else:
            item = next(tasks[rng.choices(list(tasks), weights)[0]])
            prompt = [user, *core.encode(f" {item.prompt}").ids, end, assistant]
            answer = [*core.encode(f" {item.answer}").ids, end]
            yield prompt + answer, [-100] * len(prompt) + answer


def packed(source: Iterator[tuple[list[int], list[int]]], look_ahead: int = 64) -> Iterator[Row]:
    """Rows of `ROW` tokens, first fit in a window of `look_ahead` examples."""
    window = list(islice(source, look_ahead))
    while True:
        row = Row([], [], [], [])
        while fitting := next((x for x in window if len(row.ids) + len(x[0]) <= ROW), None):
            window.remove(fitting)
            window.append(next(source))
            ids, labels = fitting
            row.owners.extend([row.owners[-1] + 1 if row.owners else 1] * len(ids))
            row.positions.extend(range(len(ids)))
            row.labels.extend([-100, *labels[1:]])
            row.ids.extend(ids)
        if not row.ids:
            raise ValueError(f"an example is longer than a row of {ROW} tokens: {len(window[0][0])}")
        rest = ROW - len(row.ids)
        yield Row(row.ids + [0] * rest, row.labels + [-100] * rest, row.positions + [0] * rest, row.owners + [0] * rest)


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Tensor]]:
    rows = packed(encoded(tokenizer))
    causal = torch.ones(ROW, ROW, dtype=torch.bool).tril()
    while True:
        ids, labels, positions, owners = (torch.tensor(x) for x in zip(*islice(rows, ROWS)))
        own = owners[:, :, None] == owners[:, None, :]
        mask = torch.zeros(ROWS, 1, ROW, ROW).masked_fill(~(own & causal)[:, None], -1e9)
        yield {"input_ids": ids, "labels": labels, "position_ids": positions, "attention_mask": mask}


def schedule(step: int) -> float:
    """Linear warm-up, then a cosine down to zero, as a factor of the peak."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(out: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    compiled = torch.compile(model, dynamic=False)
    opts = optimizers(model)
    start, seen, recent = time.time(), 0, []
    for step, batch in enumerate(islice(batches(tokenizer), STEPS)):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = PEAK_LR * schedule(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        recent.append(loss.item())
        seen += int((batch["position_ids"] > 0).sum())
        if (step + 1) % 50 == 0:
            clock = time.time() - start
            print(
                f"{step + 1:5d} loss {sum(recent) / len(recent):.4f} {seen / clock:.0f} tok/s {clock:.0f} s", flush=True
            )
            recent = []
        if (step + 1) % 500 == 0 or step + 1 == STEPS:
            save(model, tokenizer, out)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """fp16 weights; the config says float32, so that a plain load computes in float32 on any CPU."""
    half = make_model(len(tokenizer)).half()
    half.load_state_dict(model.state_dict())
    half.generation_config.update(do_sample=False, eos_token_id=1, pad_token_id=0)
    half.save_pretrained(out)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    _edit(out / "config.json", dtype="float32")
    _edit(out / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2) + "\n")


def load(out: Path) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), tokenizer


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], new: int = 40) -> list[str]:
    """Greedy answers through the chat template."""
    found = []
    for at in range(0, len(prompts), 50):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[at : at + 50]]
        batch = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(**batch, max_new_tokens=new, do_sample=False)[:, batch["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return found


def test_pairs(task: str, n: int) -> list[tuple[str, str]]:
    """Up to `n` distinct test examples: fewer where the split holds fewer."""
    drawn = {item.prompt: item.answer for item in islice(stream(task, "test", 1), 20 * n)}
    return list(drawn.items())[:n]


def chat(item: Item) -> list[dict[str, str]]:
    return [{"role": "user", "content": item.prompt}, {"role": "assistant", "content": item.answer}]


def exact_match(model: Any, tokenizer: Any, wanted: list[tuple[str, str]]) -> float:
    got = answers(model, tokenizer, [prompt for prompt, _ in wanted])
    return sum(a == b for a, (_, b) in zip(got, wanted)) / len(wanted)


def lora(
    out: Path, task: str, steps: int, lr: float, batch_size: int, test: list[tuple[str, str]]
) -> tuple[float, float]:
    """Exact match after rank-8 LoRA on all linear layers, and the CPU seconds of training."""
    torch.manual_seed(0)
    base, tokenizer = load(out)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    data = stream(task, "train")
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
    start = time.process_time()
    for step in range(steps):
        rows = [chat(item) for item in islice(data, batch_size)]
        batch = tokenizer.apply_chat_template(
            rows, padding=True, return_tensors="pt", return_dict=True, return_assistant_tokens_mask=True
        )
        labels = batch["input_ids"].masked_fill(torch.as_tensor(batch.pop("assistant_masks")) == 0, -100)
        for group in opt.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        opt.step()
        opt.zero_grad()
    seconds = time.process_time() - start
    return exact_match(model.eval(), tokenizer, test), seconds


def seen_table(out: Path, n: int) -> str:
    model, tokenizer = load(out)
    rows = []
    for task in SEEN:
        wanted = test_pairs(task, n)
        rows.append(f"| `{task}` | {exact_match(model, tokenizer, wanted):.1%} | {len(wanted)} |".replace("%", " %"))
        print(rows[-1], flush=True)
    return "\n".join(rows)


def held_out_table(out: Path, n: int) -> str:
    model, tokenizer = load(out)
    rows = []
    for task in held_out():
        wanted = test_pairs(task, n)
        before = exact_match(model, tokenizer, wanted)
        run = DEMO if task == DEMO_TASK else RUNS[task]
        after, seconds = lora(out, task, **run, test=wanted)
        knobs = f"{run['steps']} | {run['lr']:g} | {run['batch_size']} | {seconds:.0f} s"
        rows.append(f"| `{task}` | {before:.1%} | {after:.1%} | {knobs} |".replace("%", " %"))
        print(rows[-1], flush=True)
    return "\n".join(rows)


def card(out: Path, n: int = 100) -> None:
    """Measure everything and write the card."""
    model, tokenizer = load(out)
    text = CARD.format(
        parameters=f"{sum(p.numel() for p in model.parameters()):,}",
        megabytes=f"{(out / 'model.safetensors').stat().st_size / 1e6:.1f}",
        vocabulary=len(tokenizer),
        row=ROW,
        rows=ROWS,
        steps=STEPS,
        seed=SEED,
        world=WORLD_SEED,
        n=n,
        seen=seen_table(out, n),
        held_out=held_out_table(out, n),
    )
    (out / "README.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("train", "lora", "card"))
    parser.add_argument("--out", type=Path, default=base_path())
    parser.add_argument("--task", default=DEMO_TASK, help="for lora: the held-out task to try")
    parser.add_argument("--steps", type=int, default=DEMO["steps"])
    parser.add_argument("--lr", type=float, default=DEMO["lr"])
    parser.add_argument("--batch-size", type=int, default=DEMO["batch_size"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.action == "train":
        train(args.out)
    elif args.action == "card":
        card(args.out)
    else:
        after, seconds = lora(args.out, args.task, args.steps, args.lr, args.batch_size, test_pairs(args.task, 200))
        print(f"{args.task}: {after:.1%} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
