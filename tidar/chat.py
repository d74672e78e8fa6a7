"""``tidar chat``: a terminal loop over one model.

A model with a chat template holds a conversation. A base model completes: each entry is a text to go on from, and an
empty entry goes on with the last one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from tidar.api import Model
from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.terminal import Shown, show

__all__ = ["run"]

HELP = "/exit  /reset: forget the text so far  /params [name=value …]: show or set; a line ending in \\ goes on below"


def run(model: Model, params: SamplingParams, options: Mapping[str, Any]) -> None:
    """Read entries until ``/exit`` or the end of input.

    Args:
        model: what answers.
        params: how it is sampled; ``/params`` changes them.
        options: keyword arguments of `Model.stream`.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its history and editing)

    console = Console(highlight=False)
    text = Conversation(model) if model.core.tokenizer.chat_template else Completing()
    console.print(f"{model.core.path}: {text.kind}\n{HELP}", style="dim", markup=False)
    while True:
        try:
            entry = _read(console)
        except EOFError:
            return
        try:
            match entry.split():
                case ["/exit"]:
                    return
                case ["/reset"]:
                    text.reset()
                case ["/params", *changes]:
                    params = _changed(params, changes)
                    console.print(params, style="dim", markup=False)
                case [word, *_] if word.startswith("/"):
                    raise TidarError(f"unknown command {word}: {HELP}")
                case _:
                    _answer(console, model, text, entry, params, options)
        except TidarError as error:
            console.print(str(error), style="red", markup=False)


class Completing:
    """The text of a base model."""

    kind = "completes text; an empty line goes on with it"

    def __init__(self) -> None:
        self._text = ""

    def ask(self, entry: str) -> str:
        """The prompt for ``entry``."""
        return entry or self._text

    def keep(self, entry: str, answer: str) -> None:
        self._text = self.ask(entry) + answer

    def reset(self) -> None:
        self._text = ""


class Conversation:
    """The messages of a model with a chat template."""

    kind = "conversation by its chat template"

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.core.tokenizer
        self._messages: list[dict[str, str]] = []

    def ask(self, entry: str) -> list[int]:
        messages = [*self._messages, {"role": "user", "content": entry}]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The template writes the special tokens itself.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def keep(self, entry: str, answer: str) -> None:
        self._messages += [{"role": "user", "content": entry}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        self._messages.clear()


def _read(console: Console) -> str:
    lines = [console.input("[bold]> [/]")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(console.input("[bold]. [/]"))
    return "\n".join(lines)


def _answer(
    console: Console,
    model: Model,
    text: Completing | Conversation,
    entry: str,
    params: SamplingParams,
    options: Mapping[str, Any],
) -> None:
    shown = Shown()
    # Ctrl-C ends the answer, not the chat; what has come is kept.
    with contextlib.suppress(KeyboardInterrupt):
        show(console, model.stream(text.ask(entry), params, **options), shown)
    text.keep(entry, shown.text)
    console.print(str(shown), style="dim")


def _changed(params: SamplingParams, changes: list[str]) -> SamplingParams:
    values: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            kind = type(vars(params)[name])
            values[name] = kind(json.loads(value))
        except (KeyError, ValueError, TypeError):
            names = ", ".join(vars(params))
            raise TidarError(f"cannot set {change!r}: give name=value, value in JSON, with a name of {names}") from None
    return replace(params, **values)
