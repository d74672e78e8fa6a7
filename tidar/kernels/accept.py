"""What comes before and behind the network in a step, on the device: its tokens, what it drafts for, and which drafts
stand.

Legend: B rows, K drafts, P proposals of A alternates and M masks each, L = K + P·(A + M) queries, D width.
`tidar.kernels.reference_step` is the plain twin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.pdl import begin, options
from tidar.kernels.reference_step import SURE, Picking
from tidar.kernels.workspace import power_of_2

__all__ = ["accept", "embed"]

NARROW = 1024
"""Width up to which one warp embeds: its maxima wait for no other."""


@triton.jit
def _pick(chances, chance_step, row, DRAFTS: tl.constexpr, DRAFTS_UP: tl.constexpr, PROPOSALS: tl.constexpr):
    """Of each outcome of a row: its place (`tidar.proposals.ranks`), whether it is drafted for, by which proposal."""
    n = tl.arange(0, DRAFTS_UP)  # outcome n + 1
    chances += row * chance_step + n
    stood = tl.sqrt_rn(tl.load(chances, mask=(n > 0) & (n < DRAFTS), other=1.0))
    stands = tl.sqrt_rn(tl.load(chances + 1, mask=n < DRAFTS - 1, other=0.0))
    likely = tl.where(n < DRAFTS, tl.cumprod(stood, 0) * (1 - stands), -1.0)
    here, there = likely[:, None], likely[None, :]
    before = (there > here) | ((there == here) & (n[None, :] < n[:, None]))
    place = tl.sum(before.to(tl.int32), 1)
    chosen = (place < PROPOSALS) & (n < DRAFTS)
    index = tl.cumsum(chosen.to(tl.int32), 0) - 1
    # NaN comes before nothing: all places are the first then, and the lowest levels are taken.
    return place, chosen & (index < PROPOSALS), index


@triton.jit
def _embed(
    drafts, table, out, chances, places, levels, named, scores, came, alternates, mask_id, draft_step, chance_step,
    DRAFTS: tl.constexpr, DRAFTS_UP: tl.constexpr, PROPOSALS: tl.constexpr, EACH: tl.constexpr, RUNS: tl.constexpr,
    SLOTS: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A query; the first program of a row picks what is drafted for, beside the others. Those of alternates pick too:
    that is quicker than to wait."""
    begin(PDL)
    query, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if chances is not None:
        n = tl.arange(0, DRAFTS_UP)
        if query == 0:
            place, chosen, index = _pick(chances, chance_step, row, DRAFTS, DRAFTS_UP, PROPOSALS)
            tl.store(places + row * DRAFTS + n, place.to(tl.int64), mask=n < DRAFTS)
            if PROPOSALS:
                tl.store(levels + row * PROPOSALS + index, (n + 1).to(tl.int64), mask=chosen)
            return
        query -= 1
    token = tl.load(drafts + row * draft_step + query, mask=query < DRAFTS, other=mask_id)
    if EACH:
        other = query - DRAFTS
        if (other >= 0) & (other < PROPOSALS * EACH):
            every = tl.minimum(n, RUNS - 1)
            if came is not None:  # asked for before it is known which, as one load more would wait for another
                from_slot = tl.load(came + row * RUNS + every)
            _, chosen, index = _pick(chances, chance_step, row, DRAFTS, DRAFTS_UP, PROPOSALS)
            mine = chosen & (index == other // EACH)
            at = row * RUNS + tl.sum(tl.where(mine, every, 0), 0)  # the draft behind the level's
            if scores is not None:
                slots = tl.arange(0, SLOTS)
                begin_at = at * SLOTS + tl.sum(tl.where(mine, from_slot, 0), 0)
                score, listed = tl.load(scores + begin_at * SLOTS + slots), tl.load(named + at * SLOTS + slots)
                for _ in range(other % EACH + 1):  # the draft itself and those before
                    best = tl.min(tl.where(score == tl.max(score, 0), slots, SLOTS - 1), 0)
                    score = tl.where(slots == best, float("-inf"), score)
                best = tl.min(tl.where(score == tl.max(score, 0), slots, SLOTS - 1), 0)
                token = tl.sum(tl.where(slots == best, listed, 0), 0).to(tl.int64)
            else:
                token = tl.load(named + at * SLOTS + other % EACH).to(tl.int64)
            tl.store(alternates + row * PROPOSALS * EACH + other, token)
    column = tl.arange(0, WIDTH)
    x = tl.load(table + token * D + column, mask=column < D)
    tl.store(out + (row * QUERIES + query) * D + column, x, mask=column < D)


def embed(
    drafts: Tensor, table: Tensor, mask_id: int, queries: int, count: int, *, picking: Picking | None = None
) -> Tensor:
    """Embeddings (B, L, D) of the first ``count`` drafts of each row, of alternates, and of masks behind them.

    Args:
        drafts: (B, at least K) int64, rows may be strided.
        table: (V, D) contiguous.
        mask_id: the mask's row in it.
        queries: L.
        count: K.
        picking: where to find the drafts' chances and their runners-up, and to leave what the step drafts for and its
            alternates; without, nothing is picked, and there are no alternates.
    """
    rows, width = drafts.shape[0], table.shape[1]
    out = torch.empty(rows, queries, width, dtype=table.dtype, device=table.device)
    chances, places, levels, runners, alternates = picking or (None,) * 5
    named, scores, came = runners or (None,) * 3
    _embed[queries + (picking is not None), rows](
        drafts, table, out, chances, places, levels, named, scores, came, alternates, mask_id, drafts.stride(0),
        0 if chances is None else chances.stride(0),
        DRAFTS=count, DRAFTS_UP=power_of_2(count), PROPOSALS=0 if levels is None else levels.shape[1],
        EACH=0 if alternates is None else alternates.shape[2], RUNS=0 if named is None else named.shape[1],
        SLOTS=0 if named is None else named.shape[2],
        QUERIES=queries, D=width, WIDTH=power_of_2(width), num_warps=1 if width <= NARROW else 4,
        **options(table.device),
    )  # fmt: skip
    return out


@triton.jit
def _accept(
    sampled, drafts, lengths, limits, tickets, ring, places, levels, alternates, states, made, seen, bad,
    draft_step, ring_step, ring_row, seen_step,
    DRAFTS: tl.constexpr, DRAFTS_UP: tl.constexpr, PROPOSALS: tl.constexpr, PROPOSALS_UP: tl.constexpr,
    EACH: tl.constexpr, EACH_UP: tl.constexpr, SURE: tl.constexpr,
    MASKS: tl.constexpr, MASKS_UP: tl.constexpr, QUERIES: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, DRAFTS_UP)
    s = tl.load(sampled + row * DRAFTS + i, mask=i < DRAFTS, other=0)
    d = tl.load(drafts + row * draft_step + i + 1, mask=i + 1 < DRAFTS, other=0)
    if EACH:  # asked for before it is known which are
        p, a = tl.arange(0, PROPOSALS_UP)[:, None], tl.arange(0, EACH_UP)[None, :]
        there = (p < PROPOSALS) & (a < EACH)
        others = tl.load(alternates + (row * PROPOSALS + p) * EACH + a, mask=there, other=-1)
    # n: the first place whose sample is not the draft behind it, or all.
    stop = (s != d) | (i == DRAFTS - 1)
    n = tl.min(tl.where(stop & (i < DRAFTS), i, DRAFTS - 1), 0) + 1

    ticket = tl.load(tickets + row)
    entry = ring + ticket % DEPTH * ring_step + row * ring_row
    broken = tl.load(bad) != 0
    tl.store(entry, tl.where(broken, -1, n))
    tl.store(entry + 4 + i, s.to(tl.int32), mask=i < n)
    tl.store(tickets + row, ticket + 1)
    follow = tl.sum(tl.where(i == n - 1, s, 0), 0)
    tl.store(drafts + row * draft_step, follow)
    length = tl.load(lengths + row)
    tl.store(lengths + row, tl.minimum(length + n, tl.load(limits + row)))
    if seen is not None:
        tl.store(seen + row * seen_step + s, tl.full((DRAFTS_UP,), 1, tl.int1), mask=i < n)
    behind, met = tl.full((), MASKS, tl.int32), tl.full((), -1, tl.int32)
    if PROPOSALS:
        p, j = tl.arange(0, PROPOSALS_UP), tl.arange(0, MASKS_UP)
        level = tl.load(levels + row * PROPOSALS + p, mask=p < PROPOSALS, other=DRAFTS + 1).to(tl.int32)
        block = tl.sum((level <= n).to(tl.int32), 0) - 1
        behind = tl.where(block < 0, behind, n - tl.max(tl.where(level <= n, level, 0), 0))
        place = j + 1 + behind
        inside = j < MASKS - 1
        first, block = row * QUERIES + DRAFTS, tl.maximum(block, 0)
        state = first + PROPOSALS * EACH + block * MASKS + tl.minimum(place, MASKS - 1)
        kind = (place < MASKS).to(tl.int8)
        if EACH:
            here = (tl.arange(0, PROPOSALS_UP)[:, None] == block) & (others == follow) & (behind == 0)
            least = tl.min(tl.where(here, tl.arange(0, EACH_UP)[None, :], EACH_UP))
            met = tl.where(least < EACH_UP, least, met)
            # The draft behind the certain token is what its alternate says.
            state = tl.where((j == 0) & (met >= 0), first + block * EACH + met, state)
            kind = tl.where((j == 0) & (met >= 0), SURE, kind).to(tl.int8)
        tl.store(states + row * (MASKS - 1) + j, state.to(tl.int32), mask=inside)
        tl.store(made + row * (MASKS - 1) + j, kind, mask=inside)
    tl.store(entry + 1, behind)
    tl.store(entry + 3, met)
    if places is not None:
        tl.store(entry + 2, tl.load(places + row * DRAFTS + n - 1).to(tl.int32))


def accept(
    sampled: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    limits: Tensor,
    tickets: Tensor,
    ring: Tensor,
    bad: Tensor,
    *,
    levels: Tensor,
    places: Tensor | None,
    alternates: Tensor | None = None,
    masks: int,
    queries: int,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Commit the drafts that stand (paper, section 3.2), and find the masks that draft what follows.

    The first n drafts stand, where n is the first place with s_n ≠ d_{n+1}, or K. The tokens that become certain are
    s_1 … s_n. If "exactly n accepted" was not drafted for, the tail of the nearest lower proposal serves. If it was,
    and s_n is one of the proposal's alternates, the token behind s_n is what that alternate's logits say.

    Args:
        sampled: (B, K) int64 contiguous, s_1 … s_K.
        drafts: (B, at least K) int64; its first column becomes s_n.
        lengths: (B,) int32, committed tokens; n more afterwards.
        limits: (B,) int32, what lengths never pass: rows that rest have theirs at it.
        tickets: (B,) int32, steps so far; one more afterwards.
        ring: (depth, B, at least K + 4) int32, page-locked memory of the host. To entry ``t % depth`` of step t go n,
            or -1 if ``bad`` is set; how far into their block the next drafts begin, M without one; the place of this
            outcome among the likeliest; which alternate s_n is, or -1; and the certain tokens.
        bad: (1,) int32, not 0 when the network gave NaN.
        levels: (B, P) int64 contiguous, the proposals, ascending.
        places: (B, K) int64 contiguous, of the outcomes (`tidar.proposals.ranks`); None if they were not ranked.
        alternates: (B, P, A) int64 contiguous, tokens, if there are any.
        masks: M.
        queries: L.
        seen: (B, V) bool, tokens of the committed text; the new ones are added.

    Returns:
        states: (B, M - 1) int32, rows of the flattened (B·L, D) hidden states that draft the tokens behind s_n.
        made: (B, M - 1) int8, which of them exist; `SURE` for that of an alternate, which is no mask.
    """
    rows, count = sampled.shape
    each = 0 if alternates is None else alternates.shape[2]
    states = torch.empty(rows, masks - 1, dtype=torch.int32, device=sampled.device)
    made = torch.empty(rows, masks - 1, dtype=torch.int8, device=sampled.device)
    _accept[rows,](
        sampled, drafts, lengths, limits, tickets, ring, places, levels, alternates, states, made, seen, bad,
        drafts.stride(0), ring.stride(0), ring.stride(1), 0 if seen is None else seen.stride(0),
        DRAFTS=count, DRAFTS_UP=power_of_2(count), PROPOSALS=levels.shape[1],
        PROPOSALS_UP=power_of_2(max(levels.shape[1], 1)), EACH=each,
        EACH_UP=power_of_2(max(each, 1)), SURE=SURE, MASKS=masks, MASKS_UP=power_of_2(max(masks - 1, 1)),
        QUERIES=queries, DEPTH=ring.shape[0], num_warps=1, **options(sampled.device),
    )  # fmt: skip
    return states, made
