"""A tokenizer whose ids can be written by hand: one token per character, plus five special ones."""

import json

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
CHARACTERS = [chr(i) for i in range(32, 127)] + ["\n", "é", "…"]


@pytest.fixture
def make_tokenizer():
    def make(template=None, *, bos=False, omit=(), **options):
        tokens = ["<pad>", "<s>", "</s>", "<|a|>", "<|u|>", *CHARACTERS]
        core = Core(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="?"))
        core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        core.decoder = decoders.Fuse()
        if bos:
            from tokenizers.processors import TemplateProcessing

            core.post_processor = TemplateProcessing(
                single="<s> $A </s>" if bos == "both" else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
            )
        special = {k: v for k, v in SPECIAL.items() if k not in omit}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, additional_special_tokens=["<|a|>", "<|u|>"], **special, **options
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def trained_text():
    """The trained tokens of an example, decoded: runs joined by '|'."""

    def text(example, tokenizer):
        runs, last = [], None
        for i, flag in enumerate(example.trained):
            if flag and last == i - 1:
                runs[-1].append(example.ids[i])
            elif flag:
                runs.append([example.ids[i]])
            last = i if flag else last
        return "|".join(tokenizer.decode(run) for run in runs)

    return text


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(x) + "\n" for x in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
