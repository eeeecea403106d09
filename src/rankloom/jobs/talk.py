"""Answers and conversations from a run's folder, an adapter's folder or a bare model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rankloom.errors import suggest
from rankloom.hf.generate import Decoding, chat_prompt, continue_texts
from rankloom.hf.models import Loaded
from rankloom.jobs.opening import Opened
from rankloom.jobs.runs import load_adapted
from rankloom.train.data import Turn


def answer_job(opened: Opened, prompts: Sequence[str], decoding: Decoding, *, raw: bool = False) -> list[str]:
    """The answer to each prompt; `raw` continues the text as it is, without the chat template."""
    loaded = load_adapted(opened.config, opened.adapter)
    texts = list(prompts)
    if not raw:
        template = _template(opened)
        texts = [chat_prompt([Turn("user", text.strip())], loaded.tokenizer, template) for text in texts]
    return continue_texts(loaded.model, loaded.tokenizer, texts, decoding, special=raw)


@dataclass
class Conversation:
    """A talk with one model. `said`: the turns so far; commands begin with `/`."""

    loaded: Loaded
    decoding: Decoding
    template: str
    system: str | None = None
    said: list[Turn] = field(default_factory=list)
    adapter: str | None = None

    @classmethod
    def start(cls, opened: Opened, decoding: Decoding, system: str | None = None) -> Conversation:
        """Load the model and its adapter."""
        loaded = load_adapted(opened.config, opened.adapter)
        name = opened.config.name if opened.adapter is not None else None
        talk = cls(loaded, decoding, _template(opened), system, adapter=name)
        talk._forget()
        return talk

    def say(self, line: str, tell: Callable[[str], None] | None = None) -> str:
        """The answer to a line, or to a command; `tell` is told it piece by piece."""
        if line.startswith("/"):
            found = self._command(line[1:].strip())
            (tell or _silent)(found)
            return found
        asked = [*self.said, Turn("user", line)]
        text = chat_prompt(asked, self.loaded.tokenizer, self.template)
        [answer] = continue_texts(self.loaded.model, self.loaded.tokenizer, [text], self.decoding, tell=tell)
        self.said = [*asked, Turn("assistant", answer)]
        return answer

    def turns(self) -> list[dict[str, str]]:
        """What was said, as messages."""
        return [{"role": turn.role, "content": turn.content} for turn in self.said]

    @property
    def commands(self) -> dict[str, str]:
        """What `/word` does here; `/exit` is the reader's business."""
        found = {"help": "shows this", "reset": "forgets what was said", "exit": "ends, as Ctrl-D does"}
        return found | ({"base": "lets the bare model speak", "adapter": "the adapted one"} if self.adapter else {})

    def _command(self, name: str) -> str:
        if name not in self.commands:
            return f"(there is no command /{name}{suggest(f'/{name}', [f'/{word}' for word in self.commands])})"
        if name == "help":
            return "\n".join(f"/{word:<8} {does}" for word, does in self.commands.items())
        if name == "reset":
            self._forget()
            return "(forgotten)"
        self.loaded.model.rankloom.use(*([self.adapter] if name == "adapter" else []))
        return f"({name} speaks)"

    def _forget(self) -> None:
        self.said = [Turn("system", self.system)] if self.system else []


def _template(opened: Opened) -> str:
    """The chat template that the run trained with."""
    return opened.config.data.template if opened.config.data is not None else "auto"


def _silent(text: str) -> None:
    return None
