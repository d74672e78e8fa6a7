"""Conversations as training text: the chat template writes them, and only what the assistant says is learnt.

A conversation is written turn by turn as it would be while it is held: the text before each answer is what a decoder
would be given as its prompt, so prompt and answer are tokenised apart, as they are when the model is asked. A decoder
that is given earlier answers too tokenises them with their questions; where special tokens end turns, that is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidar.data.tokenizer import BATCH
from tidar.errors import TidarError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["Message", "Segment", "Template", "encode_conversations", "template_encoder"]

Message = dict[str, str]
"""``role`` (system, user, assistant …) and ``content``."""


class Segment(NamedTuple):
    """A piece of a conversation's text."""

    text: str
    learned: bool


class Template:
    """The chat template of ``tokenizer``, which must have one.

    Raises:
        TidarError: it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise TidarError("conversations need a chat template and the tokenizer has none: name one in chat_template")
        self._tokenizer = tokenizer
        # Not those alone that have a name, such as eos: a template writes others too.
        self._special = tuple(t.content for t in tokenizer.added_tokens_decoder.values() if t.special)

    def spells_special(self, messages: Sequence[Message]) -> bool:
        """Whether a turn spells out a special token, which would be taken for the template's own."""
        return any(token in message["content"] for message in messages for token in self._special)

    def segments(self, messages: Sequence[Message], origin: str) -> list[Segment]:
        """What is read and what is learnt, in turns, until the end of the last answer.

        Raises:
            TidarError: the template refuses the conversation, or rewrites earlier turns when one is added.
        """
        found: list[Segment] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._written(messages[:index], origin, ask=True)
            told = self._written(messages[: index + 1], origin, ask=False)
            if not (asked.startswith(done) and told.startswith(asked)):
                raise TidarError(
                    f"{origin}: the chat template writes earlier turns otherwise once a turn is added; split such "
                    "conversations, or name another chat_template"
                )
            found += [Segment(asked[len(done) :], False), Segment(told[len(asked) :], True)]
            done = told
        return found

    def _written(self, messages: Sequence[Message], origin: str, *, ask: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False)
        except (TemplateError, TypeError, ValueError) as error:
            raise TidarError(f"{origin}: the chat template refuses the conversation: {error}") from error
        assert isinstance(text, str)
        return text


def template_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy that knows the special tokens a template writes, and adds none."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def encode_conversations(
    encoder: Tokenizer, conversations: Iterable[Sequence[Segment]], eos_id: int
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
    """Ids (n,) uint32 of each conversation and which of them are learnt, (n,) bool.

    It ends with the end-of-text token, learnt too: the template's own, or one behind it. What a template writes after
    an answer's end-of-text token is not learnt: no decoder would come to it.
    """
    remaining = iter(conversations)
    while batch := list(islice(remaining, BATCH)):
        texts = [segment.text for segments in batch for segment in segments]
        encoded = iter(encoder.encode_batch_fast(texts, add_special_tokens=False))
        for segments in batch:
            ids: list[int] = []
            learned: list[bool] = []
            end = 0
            for segment in segments:
                new: list[int] = next(encoded).ids
                ids += new
                ends = [i for i, token in enumerate(new, 1) if token == eos_id]
                kept = (ends[-1] if ends else len(new)) if segment.learned else 0
                learned += [True] * kept + [False] * (len(new) - kept)
                end = len(ids) - len(new) + kept
            # Behind the last answer nothing is left to read.
            if ids[end - 1] == eos_id:
                ids, learned = ids[:end], learned[:end]
            else:
                ids, learned = [*ids[:end], eos_id], [*learned[:end], True]
            yield np.array(ids, np.uint32), np.array(learned, bool)
