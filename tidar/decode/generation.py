"""Requests in, text out: batches rows, applies stop conditions, and counts forwards.

The decoder makes tokens certain; here they are cut at the first end-of-text token, stop string or limit. A finished
row leaves the batch at once, and nothing after its end counts, in the text or in tokens per forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from tidar.config import SamplingParams
from tidar.decode.base import Decoder
from tidar.decode.text import TextStream
from tidar.errors import TidarError
from tidar.model import CausalLM

__all__ = ["Chunk", "Completion", "FinishReason", "generate", "stream"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What one forward added to one answer."""

    index: int
    """Which prompt, counted from 0."""
    token_ids: list[int]
    """Tokens that became certain; the end-of-text token included."""
    text: str
    """Text that is sure to stay; it lags behind the tokens at broken characters and possible stop strings."""
    forwards: int
    """Forwards it took: 1, or the pieces a long prompt was prefilled in."""
    finish_reason: FinishReason | None
    """``stop`` (end of text or stop string), ``length``, or None while the answer goes on."""


@dataclass(kw_only=True)
class Completion:
    """A whole answer."""

    prompt_tokens: int
    """Tokens of the prompt."""
    text: str = ""
    """The answer, without stop string or special tokens."""
    token_ids: list[int] = field(default_factory=list)
    """Its tokens; the last may be the end-of-text token."""
    finish_reason: FinishReason = "length"
    """``stop`` or ``length``."""
    forwards: int = 0
    """Forwards it took part in, prefill included."""

    @property
    def tokens_per_forward(self) -> float:
        """Returned new tokens over forwards: T/NFE, prefill counted."""
        return len(self.token_ids) / self.forwards


@dataclass(kw_only=True)
class _Row:
    index: int
    params: SamplingParams
    text: TextStream
    room: int


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    make_decoder: Callable[[], Decoder],
    batch_size: int,
) -> list[Completion]:
    """Answers to all prompts, in their order; see `stream`."""
    answers = [Completion(prompt_tokens=len(p)) for p in prompts]
    for chunk in stream(model, prompts, params, make_decoder, batch_size):
        answer = answers[chunk.index]
        answer.token_ids += chunk.token_ids
        answer.text += chunk.text
        answer.forwards += chunk.forwards
        answer.finish_reason = chunk.finish_reason or "length"
    return answers


def stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    make_decoder: Callable[[], Decoder],
    batch_size: int,
) -> Iterator[Chunk]:
    """Decode prompts ``batch_size`` at a time; yield a chunk a forward and prompt.

    Raises:
        TidarError: an empty prompt, one longer than the model, or NaN logits.
    """
    limit = model.max_positions
    for number, prompt in enumerate(prompts):
        where = f"prompt {number + 1}" if len(prompts) > 1 else "the prompt"
        if not prompt:
            raise TidarError(f"{where} is empty: give at least one token of text")
        if len(prompt) >= limit:
            raise TidarError(f"{where} has {len(prompt)} tokens, the model takes fewer than {limit}: shorten it")
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise TidarError(f"{where} has a token id outside 0 … {model.vocab_size - 1}")
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        rows = [
            _Row(
                index=i,
                params=params[i],
                text=TextStream(model.tokenizer, prompts[i], params[i].stop),
                room=min(params[i].max_new_tokens, limit - len(prompts[i])),
            )
            for i in members
        ]
        yield from _decode(model, rows, [prompts[i] for i in members], make_decoder())


def _decode(model: CausalLM, rows: list[_Row], prompts: list[Sequence[int]], decoder: Decoder) -> Iterator[Chunk]:
    try:
        yield from _steps(model, rows, prompts, decoder)
    finally:  # also when the consumer wants no more
        decoder.close()


def _steps(model: CausalLM, rows: list[_Row], prompts: list[Sequence[int]], decoder: Decoder) -> Iterator[Chunk]:
    # A generator must not keep inference mode on while its consumer runs.
    with torch.inference_mode():
        certain = decoder.prefill(prompts, [row.params for row in rows])
    before = 0
    while True:
        spent, before = decoder.forwards - before, decoder.forwards
        chunks = [_advance(model, row, new, spent) for row, new in zip(rows, certain, strict=True)]
        going = [i for i, chunk in enumerate(chunks) if chunk.finish_reason is None]
        yield from chunks
        if not going:
            return
        with torch.inference_mode():
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                decoder.select(going)
            certain = decoder.step()


def _advance(model: CausalLM, row: _Row, tokens: list[int], forwards: int) -> Chunk:
    """Take the tokens up to the row's end."""
    kept: list[int] = []
    text = ""
    reason: FinishReason | None = None
    for token in tokens:
        kept.append(token)
        row.room -= 1
        text += row.text.push(token)
        ended = token in model.eos_ids and not row.params.ignore_eos
        if ended or row.text.stopped:
            reason = "stop"
        elif row.room == 0:
            reason = "length"
        if reason is not None:
            text += row.text.finish()
            break
    return Chunk(index=row.index, token_ids=kept, text=text, forwards=forwards, finish_reason=reason)
