"""What every decoding method is: rows, a cache, and a step that makes tokens certain.

A token is *certain* once the autoregressive model has sampled it. The last certain token of a row is not in the cache
yet: the next forward computes its key and value. A decoder owns its rows from prefill until they are dropped; it
knows nothing of stop conditions, which belong to `tidar.decode.generation`.

Legend: B rows, K draft length, V vocabulary, P committed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tidar import layout
from tidar.cache import SlotCache
from tidar.config import SamplingParams
from tidar.model import CausalLM
from tidar.sampling import RowParams, process, sample

__all__ = ["PREFILL_PIECE", "Decoder", "Rows"]

PREFILL_PIECE = 1024
"""Longest prompt part of one forward; it bounds the size of the mask."""


class Decoder(Protocol):
    """A decoding method, with the state of the rows it decodes."""

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        """Take new rows; return the tokens of each that are certain after its prompt."""
        ...

    def step(self) -> list[list[int]]:
        """One forward; return the tokens of each row that it made certain, at least one."""
        ...

    def select(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        ...

    def close(self) -> None:
        """No step will follow: what the last ones taught is kept."""
        ...

    @property
    def forwards(self) -> int:
        """Forwards run since the rows were taken, prefill included."""
        ...


class Rows:
    """The state all methods share: cache, last certain token, tokens seen (for penalties), sampling parameters."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.forwards = 0

    def close(self) -> None:
        """Every step has been learnt from."""

    def open(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], masks: int) -> Tensor:
        """Prefill the prompts; return hidden states (B, 1 + masks, D) of their last tokens and the masks after them."""
        model, device = self.model, self.model.device
        self.params = RowParams.of(params, device=device)
        self.cache = SlotCache(len(prompts))
        self.seen: Tensor | None = None
        if self.params.any_penalty:
            self.seen = torch.zeros(len(prompts), model.vocab_size, dtype=torch.bool, device=device)
            for row, prompt in enumerate(prompts):
                self.seen[row, list(prompt)] = True
        self._forbidden = torch.tensor(model.suppressed, dtype=torch.long, device=device)
        pieces = max(-(-len(p) // PREFILL_PIECE) for p in prompts)
        hidden = torch.empty(0)
        for left in range(pieces - 1, -1, -1):
            # Pieces are counted from the end of each prompt, so that all rows finish in the same forward.
            ends = [max(0, len(p) - left * PREFILL_PIECE) for p in prompts]
            starts = self.cache.lengths
            counts = [end - start for end, start in zip(ends, starts, strict=True)]
            plan = layout.prefill(counts, 0 if left else masks, starts=starts, device=device)
            text = torch.zeros(len(prompts), plan.clean, dtype=torch.long)
            for row, prompt in enumerate(prompts):
                text[row, plan.clean - counts[row] :] = torch.tensor(prompt[starts[row] : ends[row]])
            tokens = plan.tokens(text.to(device), model.mask_id if masks else 0)
            hidden = model.hidden(tokens, plan, cache=self.cache)[:, plan.rows]
            self.forwards += 1
            self.cache.commit(counts)
        return hidden

    def scores(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits (B, R, V) after suppression, penalty, temperature, top-k and top-p."""
        logits[..., self._forbidden] = -torch.inf
        return process(logits, self.params, seen)

    def draw(self, logits: Tensor, positions: Tensor, seen: Tensor | None) -> Tensor:
        """The tokens (B, R) that stand at ``positions`` (B, R), by the shared noise (the contract)."""
        return sample(self.scores(logits, seen), self.params, positions)

    def note(self, tokens: Sequence[Sequence[int]]) -> None:
        """Tokens have become certain; penalties must know."""
        if self.seen is not None:
            for row, new in enumerate(tokens):
                self.seen[row, list(new)] = True

    @property
    def lengths(self) -> Tensor:
        """Committed tokens (B,) int64: the position of each row's last certain token."""
        return torch.tensor(self.cache.lengths, device=self.model.device)

    def select(self, rows: list[int]) -> None:
        index = torch.tensor(rows, device=self.model.device)
        self.cache.select(rows)
        self.params = self.params.select(rows)
        self.seen = None if self.seen is None else self.seen[index]
