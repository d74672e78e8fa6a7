"""The model's own text: how its AR half goes on at the start of every block, for drafts to learn.

Decoding wants drafts to be what the model would write, which is seldom what a human wrote. So the targets of a block of
masks may be the continuation that the current weights give to the text before the block, and its distributions. All
blocks of all rows are continued at once, one token of each a forward, on keys and values of the text that are computed
once. A document's first block has nothing before it and keeps its text.

Legend: B rows, S tokens a row, Q blocks of the row that has most, D width of the hidden state, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidar import layout
from tidar.cache import SlotCache
from tidar.data.packing import PackedBatch
from tidar.mask import Kind
from tidar.model import CausalLM
from tidar.train.inputs import Blocks, moved

__all__ = ["Rollout", "Sampling", "roll_out"]


@dataclass(frozen=True)
class Sampling:
    """A share of the blocks, drawn with ``seed``, is sampled at ``temperature``; the others are greedy."""

    share: float
    temperature: float
    seed: int


@dataclass(frozen=True, eq=False)
class Rollout:
    """What stands in each token's place when its block is continued by the model.

    Attributes:
        tokens: (B, S) int64; the text itself in a document's first block.
        hidden: (B, S, D), the hidden states that predict these tokens; of no meaning for a document's first.
        own: (B, S) bool, where the token is the model's.
    """

    tokens: Tensor
    hidden: Tensor
    own: Tensor


@torch.no_grad()
def roll_out(
    model: CausalLM,
    batch: PackedBatch,
    blocks: Blocks,
    *,
    kind: Kind = "dense",
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    sampling: Sampling | None = None,
) -> Rollout:
    """Continue the text before each block, as far as the block reaches.

    Args:
        model: its current weights; ids in ``model.suppressed`` are never written.
        batch: rows of packed documents, on the CPU.
        blocks: how they are cut.
        kind: masks of the forward over the text; those of the continuations are dense.
        autocast: makes the context in which the backbone runs; the head keeps the weights' precision, lest logits tie.
        sampling: how to choose tokens; greedily by default.
    """
    device = model.device
    text, starts = moved(batch.tokens, device), moved(batch.starts, device)
    size = text.shape[1]
    begins, firsts, ends = (moved(part, device) for part in _places(batch, blocks))
    banned = torch.zeros(model.vocab_size, dtype=torch.bool)
    banned[list(model.suppressed)] = True
    choose = _Chooser(moved(banned, device), firsts.shape, sampling)
    cache = SlotCache(text.shape[0], scattered=True)
    with autocast():
        hidden = model.hidden(text, layout.packed(starts), cache=cache, kind=kind)
    # Slot 0 takes what padding writes: its own values, as a row's first token is never continued.
    tokens, own = text.clone(), torch.zeros_like(text, dtype=torch.bool)
    predicting = pad(hidden[:, :-1], (0, 0, 1, 0))
    state = _at(hidden, (firsts - 1).clamp(min=0))
    longest = min(blocks.k, size)  # also without a block: ranks that share the weights must run the same forwards
    for offset in range(longest):
        real = firsts + offset < ends
        place = torch.where(real, firsts + offset, 0)
        chosen = choose(model.head(state.to(model.dtype)))
        tokens.scatter_(1, place, torch.where(real, chosen, text[:, :1]))
        own.scatter_(1, place, real)
        wide = place[..., None].expand_as(state)
        predicting.scatter_(1, wide, torch.where(real[..., None], state, 0))
        if offset + 1 < longest:
            plan = layout.rollout(begins, firsts, ends, offset, size)
            with autocast():
                state = model.hidden(chosen, plan, cache=cache)
    return Rollout(tokens, predicting, own)


def _places(batch: PackedBatch, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """(B, Q) on the CPU: for each block with text before it, the slot where its document begins, its first slot, and
    one past its last. Rows with fewer blocks, or none, are padded with empty ones at 0."""
    rows, size = batch.tokens.shape
    slot = torch.arange(size).expand(rows, size)
    position = slot - batch.starts
    begins = (position > 0) & ((position + blocks.phase) % blocks.k == 0)
    row, first = begins.nonzero(as_tuple=True)
    column = (begins.cumsum(1) - 1)[row, first]
    places = torch.zeros(3, rows, max(1, int(begins.sum(1).max())), dtype=torch.int64)
    end = torch.minimum(first + blocks.k, batch.ends[row, first])
    places[:, row, column] = torch.stack([batch.starts[row, first], first, end])
    starts, firsts, ends = places.unbind()
    return starts, firsts, ends


def _at(hidden: Tensor, slots: Tensor) -> Tensor:
    """(B, Q, D), the rows of ``hidden`` (B, S, D) at ``slots`` (B, Q)."""
    return hidden.gather(1, slots[..., None].expand(*slots.shape, hidden.shape[-1]))


class _Chooser:
    """Logits (B, Q, V) to tokens (B, Q); a block is greedy or sampled as a whole."""

    def __init__(self, banned_V: Tensor, shape: torch.Size, sampling: Sampling | None) -> None:
        self.banned = banned_V
        self.sampling = sampling if sampling is not None and sampling.share > 0 else None
        if self.sampling is not None:
            device = banned_V.device
            self.generator = torch.Generator(device).manual_seed(self.sampling.seed)
            self.sampled = torch.rand(shape, device=device, generator=self.generator) < self.sampling.share

    def __call__(self, logits: Tensor) -> Tensor:
        scores = logits.masked_fill(self.banned, -torch.inf)
        best = scores.argmax(-1)
        if self.sampling is None:
            return best
        # Not torch.multinomial, which makes the host wait for the GPU.
        race = torch.empty_like(scores).exponential_(generator=self.generator)
        drawn = (scores / self.sampling.temperature - race.log()).argmax(-1)
        return torch.where(self.sampled, drawn, best)
