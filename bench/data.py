"""From a JSONL file to the first packed batch, beside datasets + TRL on the same tokenizer: CPU seconds and memory.

OMP_NUM_THREADS=1 python bench/data.py [--texts 8000] [--chats 1500]      writes results/data.json

Each run is a process of its own, warmed up by a few records. `memory` is the peak above what that takes; `growth` the
bytes that each further record adds, from a quarter of the records to all of them. `again` is a second start, which
finds the table on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
RESULTS = Path(__file__).parent / "results"
LENGTH, WORDS, BATCH = 1024, 130, 8
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--texts", type=int, default=8_000)
    parser.add_argument("--chats", type=int, default=1_500)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measured(given.side, given.folder, given.file)))
        return
    with tempfile.TemporaryDirectory() as name:
        found = compare(Path(name), given.texts, given.chats)
    (RESULTS / "data.json").write_text(json.dumps(found, indent=1) + "\n")


def compare(folder: Path, texts: int, chats: int) -> dict[str, Any]:
    """Both sides on both kinds of data; prints a line for each."""
    save_tokenizer(folder / "tokenizer")
    found: dict[str, Any] = {}
    for kind, count in (("texts", texts), ("chats", chats)):
        whole, part = folder / f"{kind}.jsonl", folder / f"{kind}-quarter.jsonl"
        write(whole, kind, count)
        write(part, kind, count // 4)
        for file in (whole, part):
            write(folder / file.name.replace(".jsonl", "-warm.jsonl"), kind, 32 + len(file.name))
        row: dict[str, Any] = {"records": count}
        for side in SIDES:
            less, more = run(side, folder, part), run(side, folder, whole)
            growth = (more["memory"] - less["memory"]) / (count - count // 4)
            row[side] = {**more, "growth": round(growth)}
        row["again"] = run("rankloom", folder, whole)["cpu"]
        row["cpu_ratio"] = round(row["rankloom"]["cpu"] / row["trl"]["cpu"], 3)
        found[kind] = row
        print(
            f"{count} {kind}: CPU {row['rankloom']['cpu']:.1f} s : {row['trl']['cpu']:.1f} s = {row['cpu_ratio']}; "
            f"again {row['again']:.1f} s; memory {row['rankloom']['memory'] / 1e6:.0f} : "
            f"{row['trl']['memory'] / 1e6:.0f} MB; growth {row['rankloom']['growth']} : {row['trl']['growth']} "
            f"bytes a record; rows {row['rankloom']['rows']} : {row['trl']['rows']}",
            flush=True,
        )
    return found


def run(side: str, folder: Path, file: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--file", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def measured(side: str, folder: Path, file: Path) -> dict[str, Any]:
    """CPU seconds and peak bytes above the imports, up to the first batch; rows of an epoch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    work = SIDES[side](tokenizer, folder)
    work(folder / file.name.replace(".jsonl", "-warm.jsonl"))
    before, began = peak(), time.process_time()
    rows = work(file)
    return {"cpu": round(time.process_time() - began, 2), "memory": peak() - before, "rows": rows}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(tokenizer: Any, folder: Path) -> Any:
    import pyarrow  # noqa: F401

    from rankloom.train.data import Batches, load, prepare

    def work(file: Path) -> int:
        prepared = prepare(load(file), tokenizer, max_length=LENGTH, cache=folder / "cache")
        batches = Batches(prepared, BATCH, packing=True)
        batches.batch_at(0)
        return len(batches.rows)

    return work


def trl(tokenizer: Any, folder: Path) -> Any:
    import torch
    from datasets import disable_progress_bars, load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    torch.manual_seed(0)

    def work(file: Path) -> int:
        data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "hf"))
        settings = SFTConfig(
            output_dir=str(folder / "out"),
            packing=True,
            max_length=LENGTH,
            assistant_only_loss="chats" in file.name,
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=BATCH,
        )
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        next(iter(trainer.get_train_dataloader()))
        return len(trainer.train_dataset)

    return work


SIDES = {"rankloom": ours, "trl": trl}


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([sentence(random.Random(i)) for i in range(2000)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


VOCABULARY = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 9)) for i in range(6000)]


def sentence(draw: random.Random, words: int = WORDS) -> str:
    return " ".join(draw.choices(VOCABULARY, k=draw.randint(words // 3, words)))


def write(file: Path, kind: str, count: int) -> None:
    draw = random.Random(count)
    with file.open("w") as out:
        for _ in range(count):
            if kind == "texts":
                row: dict[str, Any] = {"text": sentence(draw)}
            else:
                turns = [("user", 30), ("assistant", 60)] * draw.randint(1, 4)
                row = {"messages": [{"role": role, "content": sentence(draw, n)} for role, n in turns]}
            out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
