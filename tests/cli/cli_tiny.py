"""A tiny causal model with a byte tokenizer, as a plain Hugging Face folder."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}{%- generation -%}{{- m['content'] + '<e>' -}}"
    "{%- endgeneration -%}{%- else -%}{{- '<u>' + m['content'] + '<a>' -}}{%- endif -%}{%- endfor -%}"
)
SPECIAL = ["<p>", "<e>", "<u>", "<a>"]


def byte_tokenizer(**special):
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=plain, model_max_length=64, **special)
    made.add_special_tokens({"additional_special_tokens": ["<u>", "<a>"]})
    return made


def llama(folder, **special):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = byte_tokenizer(**special)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder
