"""What the kernels of `tidar.kernels.chain` compute, written plainly; the path taken without a GPU.

Same names, same arguments.

Legend: B rows, R drafts, V vocabulary, W width of the transition, G groups, S tokens of a shortlist.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from tidar.errors import TidarError
from tidar.kernels.reference_step import Runners
from tidar.noise import gumbel
from tidar.proposals import KNOWN, RUNNERS_UP

__all__ = [
    "DEALT", "GROUPS", "KEPT", "Blocks", "PlainLists", "chain", "check_chain", "check_results", "check_runners",
    "lanes", "prepare", "shortlist",
]  # fmt: skip

GROUPS = 32
"""G. Lists of 256 tokens lose a few drafts more than lists of 512, whose products are four times as large, which costs
more than the drafts are worth."""
KEPT = 8
"""K, tokens that a group names."""
DEALT = 8
"""Tokens dealt to a group at a time: 32 bytes of logits, so that nothing is read in vain. In turn, because tokens of
low numbers are frequent ones, and would be one group's."""
LANES = 128
"""Of a group, at most: of tokens that share a lane, one can be listed."""


@dataclass(frozen=True, eq=False)
class PlainLists:
    """What the twin leaves of `tidar.kernels.shortlists.Shortlists`.

    Attributes:
        runners: what came next after each draft.
        ranked: whether anybody asks.
    """

    runners: Runners
    ranked: bool

    @classmethod
    def of(cls, rows: int, places: int, *, states: int = 0, ranked: bool, device: torch.device | str) -> PlainLists:
        """Memory for R ``places`` in B ``rows``, of which there is no more for more states."""
        shape = rows, places, RUNNERS_UP
        return cls(Runners(*(torch.zeros(shape, dtype=torch.long, device=device) for _ in range(2))), ranked)

    def forget(self) -> None:
        """All runners-up are token 0."""
        self.runners.tokens.zero_()
        self.runners.followers.zero_()


class Blocks(NamedTuple):
    """Where in a step of L queries a row its masks stand."""

    queries: int
    """L."""
    first: int
    """Queries before them."""
    stride: int
    """M, of a block."""
    levels: Tensor | None
    """(B, P) int64: tokens before each block."""


def prepare(*_: Any, **__: Any) -> None:
    """The twin needs no lists beforehand."""


def chain(
    base: Tensor,
    state: Tensor,
    first: Tensor,
    made: Tensor,
    token_table: Tensor,
    mix: Tensor,
    suppressed: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    lengths: Tensor,
    offset: int,
    sampling: bool,
    rows: Tensor | None = None,
    given: Tensor | None = None,
    out: Tensor | None = None,
    chances: Tensor | None = None,
    shortlists: PlainLists | None = None,
) -> Tensor:
    """Drafts d_1 … d_R, each leaning on the one before; arguments as `tidar.kernels.chain.chain`.

    Any floating dtypes, float64 included, in which the sums are then.
    """
    check_chain(base, state, first, made, token_table, mix, suppressed, temperature, seed, lengths, rows)
    check_results(made, given, out, chances)
    if rows is not None:
        base, state = base[rows.long()], state[rows.long()]
    out = torch.empty(base.shape[:2], dtype=torch.int64, device=base.device) if out is None else out
    wide, before = base.dtype, first
    known = torch.zeros_like(first) if given is None else given.long()
    last: Tensor | None = None
    named = _named(base, suppressed)
    listed = named.clamp(max=base.shape[2] - 1)
    scores = base.masked_fill(suppressed, -torch.inf).gather(2, listed).masked_fill(named != listed, -torch.inf)
    for place in range(base.shape[1]):
        tokens = listed[:, place]
        noise = scores.new_zeros(())
        if sampling:
            position = lengths.long()[:, None] + offset + place
            noise = gumbel(seed, position, base.shape[2])[:, 0].gather(1, tokens)
            noise = temperature[:, None].to(wide) * noise

        def bent(before: Tensor, place: int = place, tokens: Tensor = tokens) -> Tensor:
            gate = silu(state[:, place].to(wide) + token_table[before].to(wide)).to(mix.dtype)
            return scores[:, place] + (mix[tokens].to(wide) @ gate.to(wide)[:, :, None])[:, :, 0]

        score = bent(before)
        odds = score.softmax(1).nan_to_num()  # NaN of a list without a token
        score = score + noise
        best = score.argmax(1, keepdim=True)
        if shortlists is not None and shortlists.ranked:
            if last is not None:
                behind = [tokens.gather(1, (bent(other) + noise).argmax(1, keepdim=True)) for other in last.T]
                shortlists.runners.followers[:, place - 1] = torch.cat(behind, 1)
            ranked = score.scatter(1, best, -torch.inf).sort(dim=1, descending=True, stable=True).indices
            last = shortlists.runners.tokens[:, place] = tokens.gather(1, ranked[:, :RUNNERS_UP])
            shortlists.runners.followers[:, place] = 0
        there = known > place
        before = torch.where(there, out[:, place], tokens.gather(1, best)[:, 0])
        out[:, place] = torch.where(made[:, place] | there, before, 0)
        if chances is not None:
            chance = torch.where(made[:, place], odds.gather(1, best)[:, 0], 0)
            chances[:, place] = chance.masked_fill(there, KNOWN)
    return out


def shortlist(base: Tensor, suppressed: Tensor) -> Tensor:
    """The tokens (B, R, S) that drafts are chosen from, by their logits (B, R, V) alone.

    Group by group, in each the best first, lower tokens before higher ones among equals. Where a group has too few
    tokens, the last token of the vocabulary fills its list.
    """
    return _named(base, suppressed).clamp(max=base.shape[2] - 1)


def _named(base: Tensor, suppressed: Tensor) -> Tensor:
    """`shortlist`, with numbers above all tokens where a group has too few."""
    vocab = base.shape[2]
    dealt = GROUPS, DEALT
    count = GROUPS * lanes(vocab)
    scores = pad(base.masked_fill(suppressed, -torch.inf), (0, -vocab % count), value=-torch.inf)
    scores, won = scores.unflatten(-1, (-1, count // math.prod(dealt), *dealt)).max(-4)  # of each lane
    token = won * count + torch.arange(count, device=base.device).view(won.shape[-3:])
    scores, token = (t.transpose(-3, -2).flatten(-2) for t in (scores, token))
    token, order = token.sort(-1)
    best = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices[..., :KEPT]
    named: Tensor = token.gather(-1, best).flatten(-2)
    return named


def lanes(vocab: int) -> int:
    """Lanes that each group deals its tokens to; a power of 2, one for each token or `LANES`."""
    return min(LANES, max(DEALT, 1 << (-(-vocab // GROUPS) - 1).bit_length()))


def check_chain(
    base: Tensor,
    state: Tensor,
    first: Tensor,
    made: Tensor,
    token_table: Tensor,
    mix: Tensor,
    suppressed: Tensor,
    temperature: Tensor,
    seed: Tensor,
    lengths: Tensor,
    chosen: Tensor | None,
) -> None:
    """Raise `TidarError` if the arguments of ``chain`` do not fit together."""
    lead = 3 if chosen is None else 2
    shapes = base.shape, state.shape
    if any(len(s) != lead or 0 in s for s in shapes) or base.shape[:-1] != state.shape[:-1]:
        raise TidarError(
            "logits and states must be (B, R, V) and (B, R, W), or (N, V) and (N, W) if rows are chosen, not "
            f"{tuple(base.shape)} and {tuple(state.shape)}"
        )
    rows, places = base.shape[:2] if chosen is None else chosen.shape
    vocab, width = base.shape[-1], state.shape[-1]
    if chosen is not None and (chosen.dtype != torch.int32 or not chosen.is_contiguous()):
        raise TidarError(f"rows must be (B, R) int32 and contiguous, not {tuple(chosen.shape)} {chosen.dtype}")
    if token_table.shape != (vocab, width) or mix.shape != (vocab, width) or token_table.dtype != mix.dtype:
        raise TidarError(
            f"the tables must be {(vocab, width)} of one dtype, not {tuple(token_table.shape)} {token_table.dtype} and "
            f"{tuple(mix.shape)} {mix.dtype}"
        )
    if not all(t.is_floating_point() for t in (base, state, mix, temperature)):
        raise TidarError("logits, states, tables and temperatures must be floating point")
    if suppressed.shape != (vocab,) or suppressed.dtype != torch.bool:
        raise TidarError(f"suppressed must be ({vocab},) bool, not {tuple(suppressed.shape)} {suppressed.dtype}")
    if made.shape != (rows, places) or made.dtype != torch.bool:
        raise TidarError(f"made must be {(rows, places)} bool, not {tuple(made.shape)} {made.dtype}")
    if temperature.shape != (rows,):
        raise TidarError(f"temperature must be ({rows},), not {tuple(temperature.shape)}")
    for name, values, dtype in (("first", first, torch.int64), ("seed", seed, torch.int64)):
        if values.shape != (rows,) or values.dtype != dtype:
            raise TidarError(f"{name} must be ({rows},) {dtype}, not {tuple(values.shape)} {values.dtype}")
    if lengths.shape != (rows,) or lengths.dtype != torch.int32:
        raise TidarError(f"lengths must be ({rows},) int32, not {tuple(lengths.shape)} {lengths.dtype}")


def check_results(made: Tensor, given: Tensor | None, out: Tensor | None, chances: Tensor | None) -> None:
    """Raise `TidarError` if the tensors that ``chain`` writes to do not fit its arguments."""
    rows, places = made.shape
    if given is not None and (out is None or given.shape != (rows,) or given.dtype != torch.int32):
        raise TidarError(
            f"given must be ({rows},) int32 and count drafts in out, not {tuple(given.shape)} {given.dtype}"
        )
    if chances is not None and (chances.shape != (rows, places) or chances.dtype != torch.float32):
        raise TidarError(f"chances must be {(rows, places)} float32, not {tuple(chances.shape)} {chances.dtype}")
    if out is not None and (out.shape != (rows, places) or out.dtype != torch.int64):
        raise TidarError(f"out must be {(rows, places)} int64, not {tuple(out.shape)} {out.dtype}")


def check_runners(made: Tensor, runners: Runners | None) -> None:
    """Raise `TidarError` if there is no place for the runners-up of drafts (B, R), each in its own order."""
    shape = (*made.shape, RUNNERS_UP)
    for each in () if runners is None else (runners.tokens, runners.followers):
        if each.shape != shape or each.dtype != torch.int64 or not each.is_contiguous():
            raise TidarError(f"runners-up must be {shape} int64 and contiguous, not {tuple(each.shape)} {each.dtype}")
