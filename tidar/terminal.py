"""Text on the terminal as it is made: tokens that one forward committed share a colour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from tidar.decode.generation import Chunk

__all__ = ["Shown", "show"]

COLOURS = ("bright_cyan", "bright_yellow")


@dataclass(kw_only=True)
class Shown:
    """What has been shown of one answer."""

    text: str = ""
    tokens: int = 0
    forwards: int = 0

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.forwards} forwards: {self.tokens / max(1, self.forwards):.2f} a forward"


def show(console: Console, chunks: Iterator[Chunk], shown: Shown) -> None:
    """Print the chunks of one answer as they come; ``shown`` is current even when Ctrl-C ends it."""
    for number, chunk in enumerate(chunks):
        console.print(Text(chunk.text, style=COLOURS[number % len(COLOURS)]), end="", soft_wrap=True)
        shown.text += chunk.text
        shown.tokens += len(chunk.token_ids)
        shown.forwards += chunk.forwards
    console.print()
