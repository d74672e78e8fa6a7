"""Tokens to text, as it grows: whole characters only, and never the beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

__all__ = ["TextStream"]


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        prompt: ids before the answer; some tokenizers drop the space of a text's first word.
        stop: strings that end the text and are not part of it.

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        # The last few tokens are enough context; a whole prompt would be decoded at every step, and one that begins or
        # ends inside a character would come out again.
        tails = (list(prompt[-n:]) for n in range(min(4, len(prompt)), 0, -1))
        context = next((t for t in tails if "\ufffd" not in tokenizer.decode(t)), [])
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self._undecoded: list[int] = []
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is now sure to stay."""
        self._undecoded.append(token)
        new = self._stream.step(self._backend, token)
        if new is None:
            return ""
        self._undecoded.clear()
        self._held += new
        ends = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends))
        return self._release(len(self._held) - self._longest_beginning())

    def finish(self) -> str:
        """The text still held back, once no token will follow."""
        if self.stopped:
            return ""
        broken = self._tokenizer.decode(self._undecoded, skip_special_tokens=True) if self._undecoded else ""
        return self._release(len(self._held)) + str(broken)

    def _release(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out

    def _longest_beginning(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(len(self._held), max((len(s) for s in self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
