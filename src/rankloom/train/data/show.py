"""One example for people to look at: what is trained and what is not."""

from __future__ import annotations

from itertools import groupby

from rankloom.errors import printable
from rankloom.train.data.examples import Example
from rankloom.train.data.tokenizer import Tokenizer


def preview(example: Example, tokenizer: Tokenizer, *, markup: bool = False, labels: tuple[str, ...] = ()) -> str:
    """The example as the model sees it, under a line with its place, its tokens and how many of them are trained.

    `[-…-]` is context, `{+…+}` is trained; control characters are written out. With `markup=True` Rich's tags take
    their place (dim and bold green), and brackets in the text are escaped. `labels`: the class names, to show the class
    by name.
    """
    text = _decode(tokenizer, list(example.ids))
    if example.label is not None:
        name = f" ({labels[example.label]})" if labels else ""
        head, body = f"{len(example)} tokens, class {example.label}{name}", _escape(text) if markup else text
    else:
        head = f"{len(example)} tokens, {sum(example.trained)} trained"
        body = "".join(
            _run(tokenizer, example, list(group), markup)
            for _, group in groupby(range(len(example)), example.trained.__getitem__)
        )
    place = f"{example.where}: {head}"
    return printable(f"{_escape(place) if markup else place}\n{body}")


def _run(tokenizer: Tokenizer, example: Example, run: list[int], markup: bool) -> str:
    text = _decode(tokenizer, [example.ids[i] for i in run])
    trained = example.trained[run[0]]
    if markup:
        style = "bold green" if trained else "dim"
        return f"[{style}]{_escape(text)}[/]"
    return f"{{+{text}+}}" if trained else f"[-{text}-]"


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
