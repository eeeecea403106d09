"""Answers and conversations from a run's folder, an adapter's folder or a bare model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rankloom.errors import SettingsError
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

    def say(self, line: str) -> str:
        """The answer to a line, or to a command."""
        if line.startswith("/"):
            return self._command(line[1:])
        asked = [*self.said, Turn("user", line)]
        text = chat_prompt(asked, self.loaded.tokenizer, self.template)
        [answer] = continue_texts(self.loaded.model, self.loaded.tokenizer, [text], self.decoding)
        self.said = [*asked, Turn("assistant", answer)]
        return answer

    def turns(self) -> list[dict[str, str]]:
        """What was said, as messages."""
        return [{"role": turn.role, "content": turn.content} for turn in self.said]

    def _command(self, name: str) -> str:
        if name == "reset":
            self._forget()
            return "(forgotten)"
        if name in ("base", "adapter") and self.adapter is not None:
            self.loaded.model.rankloom.use(*([self.adapter] if name == "adapter" else []))
            return f"({name} speaks)"
        raise SettingsError(
            f"there is no command /{name} here; there is /reset" + (", /base, /adapter" * bool(self.adapter))
        )

    def _forget(self) -> None:
        self.said = [Turn("system", self.system)] if self.system else []


def _template(opened: Opened) -> str:
    """The chat template that the run trained with."""
    return opened.config.data.template if opened.config.data is not None else "auto"
