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
from tidar.kernels.reference_step import HEAD, SLOT_BITS, Picking
from tidar.kernels.workspace import power_of_2
from tidar.proposals import SHARES

__all__ = ["accept", "embed"]

NARROW = 1024
"""Width up to which one warp embeds: its maxima wait for no other."""


@triton.jit
def _pick(chances, chance_step, row, DRAFTS: tl.constexpr, DRAFTS_UP: tl.constexpr, PROPOSALS: tl.constexpr):
    """Of each outcome of a row: its place (`tidar.proposals.ranks`), whether it is drafted for, by which proposal; and
    how likely it is."""
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
    return place, chosen & (index < PROPOSALS), index, likely


@triton.jit
def _pair(likely, wanted, DRAFTS: tl.constexpr, DRAFTS_UP: tl.constexpr, SHARES: tl.constexpr):
    """Of an alternate (`tidar.proposals.alternates`): the draft that it comes instead of, from 0, and its rank."""
    SOME: tl.constexpr = len(SHARES)
    rank, share = tl.arange(0, SOME), tl.full((SOME,), SHARES[0], tl.float32)
    for r in tl.static_range(1, SOME):
        share = tl.where(rank == r, SHARES[r], share)
    n, at = tl.arange(0, DRAFTS_UP), tl.arange(0, DRAFTS_UP * SOME)
    worth = tl.where((n < DRAFTS - 1)[:, None], likely[:, None] * share[None, :], -1.0)
    worth = tl.reshape(worth, (DRAFTS_UP * SOME,))
    here, there = worth[:, None], worth[None, :]
    before = tl.sum(((there > here) | ((there == here) & (at[None, :] < at[:, None]))).to(tl.int32), 1)
    # Of NaN all or none come first: any pair will do, as long as there is one.
    chosen = tl.max(tl.where((before == wanted) & (at < (DRAFTS - 1) * SOME), at, 0), 0)
    return chosen // SOME, chosen % SOME


@triton.jit
def _embed(
    drafts, table, out, chances, places, levels, named, followers, scores, came, listed, alternates, mask_id,
    draft_step, chance_step,
    DRAFTS: tl.constexpr, DRAFTS_UP: tl.constexpr, PROPOSALS: tl.constexpr, OTHERS: tl.constexpr, PAIRS: tl.constexpr,
    RUNS: tl.constexpr, SLOTS: tl.constexpr, SHARES: tl.constexpr, SLOT_BITS: tl.constexpr,
    QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A query; the first program of a row picks what is drafted for, beside the others. Those of alternates pick too:
    that is quicker than to wait."""
    begin(PDL)
    query, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if chances is not None:
        n = tl.arange(0, DRAFTS_UP)
        if query == 0:
            place, chosen, index, _ = _pick(chances, chance_step, row, DRAFTS, DRAFTS_UP, PROPOSALS)
            tl.store(places + row * DRAFTS + n, place.to(tl.int64), mask=n < DRAFTS)
            if PROPOSALS:
                tl.store(levels + row * (OTHERS + PROPOSALS) + OTHERS + index, (n + 1).to(tl.int64), mask=chosen)
            return
        query -= 1
    token = tl.load(drafts + row * draft_step + query, mask=query < DRAFTS, other=mask_id)
    if OTHERS:
        other = query - DRAFTS
        if (other >= 0) & (other < OTHERS):
            every = tl.minimum(n, RUNS - 1)
            if came is not None:  # asked for before it is known which, as one load more would wait for another
                from_slot, its_list = tl.load(came + row * RUNS + every), tl.load(listed + row * RUNS + every)
            _, _, _, likely = _pick(chances, chance_step, row, DRAFTS, DRAFTS_UP, PROPOSALS)
            second = (other < 2 * PAIRS) & (other % 2 == 1)
            wanted = tl.where(other < 2 * PAIRS, other // 2, other - PAIRS)
            instead, rank = _pair(likely, wanted, DRAFTS, DRAFTS_UP, SHARES)
            at = row * RUNS + instead
            if scores is not None:
                slots = tl.arange(0, SLOTS)
                begin_at = at * SLOTS + tl.sum(tl.where(n == instead, from_slot, 0), 0)
                tokens = named + tl.sum(tl.where(n == instead, its_list, 0), 0).to(tl.int64) * SLOTS
                score, names = tl.load(scores + begin_at * SLOTS + slots), tl.load(tokens + slots)
                behind = tl.load(followers + (at + 1) * SLOTS + slots, mask=second & (instead + 1 < RUNS), other=0)
                for _ in range(rank + 1):  # the draft itself and those before
                    best = tl.min(tl.where(score == tl.max(score, 0), slots, SLOTS - 1), 0)
                    score = tl.where(slots == best, float("-inf"), score)
                best = tl.min(tl.where(score == tl.max(score, 0), slots, SLOTS - 1), 0)
                token = tl.sum(tl.where(slots == best, names, 0), 0).to(tl.int64)
                follower = tl.sum(tl.where(slots == best, behind, 0), 0) >> 32 & ((1 << SLOT_BITS) - 1)
                token = tl.where(second, follower, token)
            else:
                token = tl.load(named + at * SLOTS + rank)
                token = tl.where(second, tl.load(followers + at * SLOTS + rank), token)
            tl.store(alternates + row * OTHERS + other, token)
            tl.store(levels + row * (OTHERS + PROPOSALS) + other, (instead + 1).to(tl.int64))
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
    chances, places, levels, runners, alternates, pairs = picking or (None, None, None, None, None, 0)
    named, followers, scores, came, listed = runners or (None,) * 5
    others = 0 if alternates is None else alternates.shape[1]
    _embed[queries + (picking is not None), rows](
        drafts, table, out, chances, places, levels, named, followers, scores, came, listed, alternates, mask_id,
        drafts.stride(0), 0 if chances is None else chances.stride(0),
        DRAFTS=count, DRAFTS_UP=power_of_2(count), PROPOSALS=0 if levels is None else levels.shape[1] - others,
        OTHERS=others, PAIRS=pairs, RUNS=0 if followers is None else followers.shape[1],
        SLOTS=0 if followers is None else followers.shape[2], SHARES=SHARES, SLOT_BITS=SLOT_BITS,
        QUERIES=queries, D=width, WIDTH=power_of_2(width), num_warps=1 if width <= NARROW else 4,
        **options(table.device),
    )  # fmt: skip
    return out


@triton.jit
def _accept(
    sampled, drafts, lengths, limits, tickets, ring, places, levels, alternates, states, made, given, seen, bad,
    draft_step, ring_step, ring_row, seen_step,
    DRAFTS: tl.constexpr, DRAFTS_UP: tl.constexpr, PROPOSALS: tl.constexpr, PROPOSALS_UP: tl.constexpr,
    OTHERS: tl.constexpr, OTHERS_UP: tl.constexpr, PAIRS: tl.constexpr, HEAD: tl.constexpr,
    MASKS: tl.constexpr, MASKS_UP: tl.constexpr, QUERIES: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row."""
    begin(PDL)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, DRAFTS_UP)
    sampled += row * (DRAFTS + OTHERS)
    levels += row * (OTHERS + PROPOSALS)
    s = tl.load(sampled + i, mask=i < DRAFTS, other=0)
    d = tl.load(drafts + row * draft_step + i + 1, mask=i + 1 < DRAFTS, other=0)
    if OTHERS:  # asked for before it is known which are
        a = tl.arange(0, OTHERS_UP)
        below = tl.load(levels + a, mask=a < OTHERS, other=0)
        other = tl.load(alternates + row * OTHERS + a, mask=a < OTHERS, other=-1)
        told = tl.load(sampled + DRAFTS + a, mask=a < OTHERS, other=-2)
    # n: the first place whose sample is not the draft behind it, or all.
    stop = (s != d) | (i == DRAFTS - 1)
    n = tl.min(tl.where(stop & (i < DRAFTS), i, DRAFTS - 1), 0) + 1

    ticket = tl.load(tickets + row)
    entry = ring + ticket % DEPTH * ring_step + row * ring_row
    broken = tl.load(bad) != 0
    tl.store(entry, tl.where(broken, -1, n))
    tl.store(entry + HEAD + i, s.to(tl.int32), mask=i < n)
    tl.store(tickets + row, ticket + 1)
    follow = tl.sum(tl.where(i == n - 1, s, 0), 0)
    tl.store(drafts + row * draft_step, follow)
    length = tl.load(lengths + row)
    tl.store(lengths + row, tl.minimum(length + n, tl.load(limits + row)))
    if seen is not None:
        tl.store(seen + row * seen_step + s, tl.full((DRAFTS_UP,), 1, tl.int1), mask=i < n)
    behind, met, sure = tl.full((), MASKS, tl.int32), tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    if OTHERS and MASKS > 1:
        firsts = (a >= 2 * PAIRS) | (a % 2 == 0)
        at = tl.min(tl.where((below == n) & (other == follow) & firsts, a, OTHERS_UP), 0)
        said = tl.sum(tl.where(a == at, told, 0), 0)
        second = tl.where(at < 2 * PAIRS, at + 1, OTHERS_UP)
        right = tl.sum(((a == second) & (other == said)).to(tl.int32), 0)
        right = tl.where(MASKS > 2, right, 0)
        if at < OTHERS_UP:
            met, sure = tl.where(at < 2 * PAIRS, at // 2, at - PAIRS), 1 + right
            tl.store(drafts + row * draft_step + 1, said)
            tl.store(drafts + row * draft_step + 2, tl.sum(tl.where(a == second, told, 0), 0), mask=right > 0)
    tl.store(given + row, sure)
    if PROPOSALS:
        p, j = tl.arange(0, PROPOSALS_UP), tl.arange(0, MASKS_UP)
        level = tl.load(levels + OTHERS + p, mask=p < PROPOSALS, other=DRAFTS + 1).to(tl.int32)
        block = tl.sum((level <= n).to(tl.int32), 0) - 1
        behind = tl.where(block < 0, behind, n - tl.max(tl.where(level <= n, level, 0), 0))
        place = j + 1 + behind
        inside = j < MASKS - 1
        first, block = row * QUERIES + DRAFTS + OTHERS, tl.maximum(block, 0)
        state = first + block * MASKS + tl.minimum(place, MASKS - 1)
        tl.store(states + row * (MASKS - 1) + j, state.to(tl.int32), mask=inside)
        tl.store(made + row * (MASKS - 1) + j, place < MASKS, mask=inside)
    tl.store(entry + 1, behind)
    tl.store(entry + 3, met)
    tl.store(entry + 4, sure)
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
    pairs: int = 0,
    masks: int,
    queries: int,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Commit the drafts that stand (paper, section 3.2), and find the masks that draft what follows.

    The first n drafts stand, where n is the first place with s_n ≠ d_{n+1}, or K. The tokens that become certain are
    s_1 … s_n. If "exactly n accepted" was not drafted for, the tail of the nearest lower proposal serves. If s_n is
    one of the alternates of level n, the token behind it is what was sampled from that alternate's logits, and if this
    is the second of its pair, so is the token behind that.

    Args:
        sampled: (B, K + A) int64 contiguous, s_1 … s_K, and the tokens behind the alternates.
        drafts: (B, at least K and M) int64; its first column becomes s_n, the next ones what alternates tell.
        lengths: (B,) int32, committed tokens; n more afterwards.
        limits: (B,) int32, what lengths never pass: rows that rest have theirs at it.
        tickets: (B,) int32, steps so far; one more afterwards.
        ring: (depth, B, at least K + `HEAD`) int32, page-locked memory of the host. To entry ``t % depth`` of step t go
            n, or -1 if ``bad`` is set; how far into their block the next drafts begin, M without one; the place of this
            outcome among the likeliest; which alternate s_n is, seconds not counted, or -1; how many drafts it tells;
            and the certain tokens.
        bad: (1,) int32, not 0 when the network gave NaN.
        levels: (B, A + P) int64 contiguous, of the alternates, and the proposals, ascending.
        places: (B, K) int64 contiguous, of the outcomes (`tidar.proposals.ranks`); None if they were not ranked.
        alternates: (B, A) int64 contiguous, tokens, if there are any.
        pairs: how many pairs they begin with.
        masks: M.
        queries: L.
        seen: (B, V) bool, tokens of the committed text; the new ones are added.

    Returns:
        states: (B, M - 1) int32, rows of the flattened (B·L, D) hidden states that draft the tokens behind s_n.
        made: (B, M - 1) bool, which of them exist.
        given: (B,) int32, how many drafts an alternate told, 0 to 2: they are in ``drafts``.
    """
    others = 0 if alternates is None else alternates.shape[1]
    rows, count, proposals = len(sampled), sampled.shape[1] - others, levels.shape[1] - others
    states = torch.empty(rows, masks - 1, dtype=torch.int32, device=sampled.device)
    made = torch.empty(rows, masks - 1, dtype=torch.bool, device=sampled.device)
    given = torch.empty(rows, dtype=torch.int32, device=sampled.device)
    _accept[rows,](
        sampled, drafts, lengths, limits, tickets, ring, places, levels, alternates, states, made, given, seen, bad,
        drafts.stride(0), ring.stride(0), ring.stride(1), 0 if seen is None else seen.stride(0),
        DRAFTS=count, DRAFTS_UP=power_of_2(count), PROPOSALS=proposals,
        PROPOSALS_UP=power_of_2(max(proposals, 1)), OTHERS=others, OTHERS_UP=power_of_2(max(others, 1)), PAIRS=pairs,
        HEAD=HEAD, MASKS=masks, MASKS_UP=power_of_2(max(masks - 1, 1)),
        QUERIES=queries, DEPTH=ring.shape[0], num_warps=1, **options(sampled.device),
    )  # fmt: skip
    return states, made, given
