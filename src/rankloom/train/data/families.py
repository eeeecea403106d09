"""Chat templates for training, by model family: the text that the family was trained on, with the answers marked.

`{% generation %}` stands around what the assistant says and the token that ends it. Made for training: without tools,
and with the same text for a conversation and its beginnings, but for Qwen3's thoughts, which that family drops from
turns before the last question.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """`jinja`: the template; `tokens`: the strings that must be single tokens for it."""

    jinja: str
    tokens: tuple[str, ...]


def _turns(opening: str, end: str, after: str = "''", text: str = "m['content']") -> str:
    """Each turn: `opening`, `text`, `end`, `after` (expressions of Jinja); an assistant's text and end are marked."""
    said = f"{{{{ ({text}) + {end} }}}}"
    return (
        f"{{% for m in messages %}}{{{{ {opening} }}}}{{% if m['role'] == 'assistant' %}}{{% generation %}}{said}"
        f"{{% endgeneration %}}{{% else %}}{said}{{% endif %}}{{{{ {after} }}}}{{% endfor %}}"
    )


def _ask(opening: str, otherwise: str = "''") -> str:
    return f"{{% if add_generation_prompt %}}{{{{ {opening} }}}}{{% else %}}{{{{ {otherwise} }}}}{{% endif %}}"


def _without_system(text: str) -> str:
    return f"{{% if messages[0]['role'] != 'system' %}}{{{{ {text} }}}}{{% endif %}}"


BOS = "{{ bos_token }}"
SYSTEM_FIRST = (
    "{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}"
)
"""For families without a system turn: its text goes before that of the first turn."""
CHATML = _turns("'<|im_start|>' + m['role'] + '\\n'", "'<|im_end|>'", "'\\n'")
CHATML_ASK = _ask("'<|im_start|>assistant\\n'")
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
LLAMA3 = _turns(
    "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'", "'<|eot_id|>'", text="m['content'] | trim"
) + _ask("'<|start_header_id|>assistant<|end_header_id|>\\n\\n'")
LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN3 = """\
{% set ns = namespace(asked=-1) %}\
{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}\
{% if m['role'] == 'assistant' %}\
{% set thought, text = '', m['content'] %}\
{% if m['reasoning_content'] is string %}{% set thought = m['reasoning_content'] %}\
{% elif '</think>' in text %}\
{% set thought = text.split('</think>')[0].split('<think>')[-1] %}\
{% set text = text.split('</think>')[-1].lstrip('\\n') %}\
{% endif %}\
{% if loop.index0 < ns.asked %}{% generation %}{{ text + '<|im_end|>' }}{% endgeneration %}\
{% elif thought.strip('\\n') %}{% generation %}\
{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') + '<|im_end|>' }}\
{% endgeneration %}\
{% else %}{{ '<think>\\n\\n</think>\\n\\n' if loop.last else '' }}\
{% generation %}{{ (text.lstrip('\\n') if loop.last else text) + '<|im_end|>' }}{% endgeneration %}{% endif %}\
{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"""

FAMILIES: dict[str, Family] = {
    "chatml": Family(CHATML + CHATML_ASK, CHATML_TOKENS),
    "qwen2": Family(
        _without_system("'<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n'") + CHATML + CHATML_ASK,
        CHATML_TOKENS,
    ),
    "qwen2_5": Family(
        _without_system(
            "'<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n'"
        )
        + CHATML
        + CHATML_ASK,
        CHATML_TOKENS,
    ),
    "qwen3": Family(QWEN3 + CHATML_ASK, CHATML_TOKENS),
    "llama3": Family(BOS + LLAMA3, LLAMA3_TOKENS),
    "mistral": Family(
        BOS
        + SYSTEM_FIRST
        + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + "{{ ' ' }}{% generation %}{{ m['content'] | trim + eos_token }}{% endgeneration %}{% else %}"
        + "{{ '[INST] ' + (first if loop.first else '') + m['content'] + '[/INST]' }}{% endif %}{% endfor %}",
        (),
    ),
    "gemma": Family(
        BOS
        + SYSTEM_FIRST
        + _turns(
            "'<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
            "+ (first if loop.first else '')",
            "'<end_of_turn>'",
            "'\\n'",
            "m['content'] | trim",
        )
        + _ask("'<start_of_turn>model\\n'"),
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi3": Family(
        _turns("'<|' + m['role'] + '|>\\n'", "'<|end|>'", "'\\n'") + _ask("'<|assistant|>\\n'", "eos_token"),
        ("<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "phi4": Family(
        _turns("'<|im_start|>' + m['role'] + '<|im_sep|>'", "'<|im_end|>'") + _ask("'<|im_start|>assistant<|im_sep|>'"),
        ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    ),
    "zephyr": Family(
        _turns("'<|' + m['role'] + '|>\\n'", "eos_token", "'\\n'") + _ask("'<|assistant|>\\n'"),
        (),
    ),
}
"""Family → its template. Mistral's is that of 7B v0.3, with the system text in the first turn."""
