"""Drafts that lean on the one before them, chosen without waiting for one another, as two Triton kernels.

With a `tidar.transition` the logits of a draft hang on the token before it, so R drafts seem to be R small products in
a row. But few tokens have a chance: each place has a shortlist of S tokens, the best by the head's logits alone, and
its draft is one of them (the beam of NART-CRF, Sun et al. 2019). What follows each token of a list within the next one
is computed for all at once: R products of S gates with S tokens, none of which waits for another. Which of these R·S
successors are the drafts is then a walk of R look-ups. The first kernel makes the lists; the second one finds the
successors, and the last of its programs walks.

As any draft is exact, a token that is on no list only costs acceptance. Lists are made by groups, without a sort:
tokens are dealt to G groups in turn, 8 at a time, and each group names its best K. Of up to G·K tokens all are listed.
A group of more than 128 tokens deals them to 128 lanes in turn, and of each lane knows only the best.

How programs meet, and why they see what others left: `tidar.kernels.attention_parts`. `tidar.kernels.reference_chain`
is the plain twin.

Legend: B rows, R drafts, V vocabulary, W width of the transition, G groups of K listed tokens, S = G·K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.attention_parts import FLOOR, last_to_come
from tidar.kernels.noise import gumbel, words
from tidar.kernels.pdl import begin, options
from tidar.kernels.reference_chain import DEALT, GROUPS, KEPT, check_chain, check_results, lanes
from tidar.kernels.reference_step import SURE
from tidar.kernels.shortlists import Shortlists
from tidar.kernels.workspace import power_of_2
from tidar.proposals import KNOWN

__all__ = ["chain"]

LAST = tl.constexpr(2**31 - 1)
LEAST = tl.constexpr(-(2**31))  # below the order of any score
BITS = tl.constexpr(22)  # a successor is its slot, below it so many bits of its token, and 32 of its odds
TOKEN = tl.constexpr(2**22 - 1)
TOGETHER = 4  # groups of a program, a warp each


@triton.jit
def _order(score):
    """Integers that order as the scores do."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    return bits ^ ((bits >> 31) & LAST)


@triton.jit
def _shortlist(
    base, suppressed, temperature, seed, lengths, chosen_rows, tokens, scores, noise, offset, base_row, base_place,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr, KEPT: tl.constexpr,
    DEALT: tl.constexpr, SAMPLING: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """What some groups of a place name."""
    begin(PDL)
    part, place, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group, lane = part * TOGETHER + tl.arange(0, TOGETHER), tl.arange(0, LANES)
    dealt = (lane // DEALT * (GROUPS * DEALT) + lane % DEALT)[None, :] + group[:, None] * DEALT
    at = row * base_row + place * base_place
    if chosen_rows is not None:
        at = tl.load(chosen_rows + row * tl.num_programs(1) + place).to(tl.int64) * base_row
    logits = base + at
    if SAMPLING:  # asked for before it is needed, as all that follows a loop
        heat, key = tl.load(temperature + row).to(tl.float32), tl.load(seed + row)
        position = tl.load(lengths + row).to(tl.int64) + offset + place
    order = tl.full((TOGETHER, LANES), LEAST, tl.int32)
    token = dealt
    for start in tl.range(0, VOCAB, GROUPS * LANES, num_stages=4):
        new = start + dealt
        score = tl.load(logits + new, mask=new < VOCAB, other=float("-inf"))
        score = tl.where(tl.load(suppressed + new, mask=new < VOCAB, other=1) == 0, score, float("-inf"))
        new_order = _order(score)
        token = tl.where(new_order > order, new, token)
        order = tl.maximum(order, new_order)

    rank = tl.arange(0, KEPT)[None, :]
    chosen = tl.zeros((TOGETHER, KEPT), tl.int32)
    value = tl.zeros((TOGETHER, KEPT), tl.int32)
    for r in tl.static_range(KEPT):
        peak = tl.max(order, 1)[:, None]
        best = tl.min(tl.where(order == peak, token, LAST), 1)[:, None]
        order = tl.where(token == best, LEAST, order)
        chosen = tl.where(rank == r, best, chosen)
        value = tl.where(rank == r, peak, value)
    # A group may have lanes without tokens: their score is -inf, and what stands for them must only be a token.
    chosen = tl.reshape(tl.minimum(chosen, VOCAB - 1), (TOGETHER * KEPT,))
    value = tl.reshape(value ^ ((value >> 31) & LAST), (TOGETHER * KEPT,)).to(tl.float32, bitcast=True)
    slot = ((row * tl.num_programs(1) + place) * tl.num_programs(0) + part) * (TOGETHER * KEPT)
    slot += tl.arange(0, TOGETHER * KEPT)
    tl.store(tokens + slot, chosen)
    tl.store(scores + slot, value)
    if SAMPLING:
        bits = tl.reshape(words(key, position, chosen // 4), (TOGETHER * KEPT, 4))
        own = tl.arange(0, 4)[None, :] == (chosen % 4)[:, None]
        tl.store(noise + slot, heat * gumbel(tl.sum(tl.where(own, bits, 0), 1)))


@triton.jit
def _follow(
    state, first, made, chosen_rows, token_table, mix, tokens, scores, noise, following, choices, came_from,
    arrived, out, chances, state_row, state_place, first_row, made_row, made_place, out_row, out_place,
    chance_row, chance_place,
    PLACES: tl.constexpr, PLACES_UP: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, SURE: tl.constexpr, KNOWN: tl.constexpr,
    SAMPLING: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The successors, within a place's shortlist, of some tokens of the one before; the last to come to a row walks."""
    begin(PDL)
    part, place, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    here = (row * PLACES + place) * SLOTS
    slot, line, k = tl.arange(0, SLOTS), part * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)[None, :]
    token = tl.load(tokens + here + slot).to(tl.int64)
    # The first place has one token before it, which stands for all.
    before = tl.load(tokens + here - SLOTS + line, mask=place > 0, other=0).to(tl.int64)
    before = tl.where(place > 0, before, tl.load(first + row * first_row))
    at_state = row * state_row + place * state_place
    if chosen_rows is not None:
        at_state = tl.load(chosen_rows + row * PLACES + place).to(tl.int64) * state_row
    state += at_state
    sure = tl.load(made + row * made_row + place * made_place) == SURE

    acc = tl.zeros((ROWS, SLOTS), tl.float32)
    for d in range(0, WIDTH, DEPTH):
        leaning = tl.load(token_table + before[:, None] * W + (d + k), mask=d + k < W, other=0.0).to(tl.float32)
        gate = leaning + tl.load(state + d + k, mask=d + k < W, other=0.0)
        weight = tl.load(mix + token[:, None] * W + (d + k), mask=d + k < W, other=0.0)
        gate = (gate * tl.sigmoid(gate)).to(weight.dtype)
        # Triton's default for float32 is tf32, which would choose other drafts than the twin.
        acc = tl.dot(gate, tl.trans(weight), acc, input_precision="ieee")
    acc = tl.where(sure, 0.0, acc) + tl.load(scores + here + slot)[None, :]
    acc = tl.where(acc == acc, acc, float("-inf"))  # NaN would equal nothing
    peak = tl.minimum(tl.maximum(tl.max(acc, 1), FLOOR), -FLOOR)  # infinities from one another are NaN
    mass = tl.maximum(tl.sum(tl.exp(acc - peak[:, None]), 1), 1.0)
    if SAMPLING:
        # logits / T + noise has its maximum where logits + T · noise has, which also serves T = 0 and overflows never.
        acc += tl.load(noise + here + slot)[None, :]
    top = tl.max(acc, 1)
    word = (slot << BITS | token.to(tl.int32))[None, :]
    leading = tl.min(tl.where(acc == top[:, None], word, LAST), 1)
    odds = top - peak - tl.log(mass)
    low = odds.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(following + here + line, leading.to(tl.int64) << 32 | low)

    if last_to_come(arrived + row, PLACES * (SLOTS // ROWS)):
        places, every = tl.arange(0, PLACES_UP), tl.arange(0, PLACES_UP * SLOTS)
        real = places < PLACES
        kind = tl.load(made + row * made_row + places * made_place, mask=real, other=0)
        kept = kind != 0
        # Look-ups wait for one another. So all successors are read at once before, which brings them into the L1 cache.
        # None is negative: the walk starts at slot 0, and not before they are there.
        table = following + row * PLACES * SLOTS
        at = tl.minimum(tl.max(tl.load(table + every, mask=every < PLACES * SLOTS, other=0)), 0).to(tl.int32)
        walked, came = tl.zeros((PLACES_UP,), tl.int64), tl.zeros((PLACES_UP,), tl.int32)
        for j in range(PLACES):
            successor = tl.load(table + j * SLOTS + at)
            walked = tl.where(places == j, successor, walked)
            came = tl.where(places == j, at, came)
            at = (successor >> (32 + BITS)).to(tl.int32)
        draft = tl.where(kept, walked >> 32 & TOKEN, 0)
        tl.store(out + row * out_row + places * out_place, draft, mask=real)
        if chances is not None:
            odd = walked.to(tl.int32).to(tl.float32, bitcast=True)
            if SAMPLING:  # how probable a draft is does not depend on its luck
                luck_at = (row * PLACES + places) * SLOTS + (walked >> (32 + BITS)).to(tl.int32)
                odd -= tl.load(noise + luck_at, mask=real, other=0.0)
            chance = tl.where(kind == SURE, KNOWN, tl.where(kept, tl.exp(odd), 0.0))
            tl.store(chances + row * chance_row + places * chance_place, chance, mask=real)
        if choices is not None:
            tl.store(came_from + row * PLACES + places, came, mask=real)
    # Behind the walk, which need not wait for so many bytes.
    if choices is not None:
        tl.store(choices + (here + line)[:, None] * SLOTS + slot[None, :], acc)


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
    out: Tensor | None = None,
    chances: Tensor | None = None,
    shortlists: Shortlists | None = None,
) -> Tensor:
    """Drafts d_1 … d_R, each of the logits that its mask and the draft before it give (`tidar.transition`).

    Draft j (from 0) of row b is the token of the place's shortlist with the highest ``logits + temperature[b] ·
    noise``, the first on the list among equals, where ``logits = base[b, j] + mix @ silu(state[b, j] +
    token_table[before])`` and the noise is that of position ``lengths[b] + offset + j`` (`tidar.noise.gumbel`). The
    gate is rounded to the dtype of ``mix``. The shortlist is made of ``base[b, j]`` alone, and its tokens are not
    filtered, as any draft is exact. The head must be linear: one that caps its logits has no ``mix``.

    Args:
        base: (B, R, V) float32, contiguous in V: the head's logits of the masks' hidden states.
        state: (B, R, W) float32, contiguous in W: the transition's view of them, `Transition.state` of the norm.
        first: (B,) int64 in 0 … V - 1, the certain token before the first draft. Not checked: it stays on the device.
        made: (B, R) bool, or int8. A draft that nobody made is token 0; those behind it are as if it had been made. One
            that is `tidar.kernels.reference_step.SURE` is of its logits alone, without the transition.
        token_table: (V, W) float32, float16 or bfloat16, contiguous: the transition's view of each token.
        mix: (V, W) in the dtype of ``token_table``, contiguous: the head's weight times `Transition.out`'s.
        suppressed: (V,) bool, tokens that are never drafted, unless all are.
        temperature: (B,) floating point; 0 is greedy.
        seed: (B,) int64.
        lengths: (B,) int32.
        offset: of the first draft's position from ``lengths``.
        sampling: whether any temperature may be above 0; without, the three tensors above are not read.
        rows: (B, R) int32 contiguous: base is (N, V) and state (N, W), and these of their rows are meant.
        out: (B, R) int64, any strides, where to write; it may share memory with ``first``, but no element.
        chances: (B, R) float32, any strides: gets the probability of each draft by the logits of its shortlist, without
            noise; 0 of one that nobody made, `tidar.proposals.KNOWN` of one that is sure.
        shortlists: made for these sizes; ranked ones tell the runners-up afterwards, also of drafts that nobody made.
            Made anew without; give them, and ``out``, where nothing may be allocated.

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_chain(base, state, first, made, token_table, mix, suppressed, temperature, seed, lengths, rows)
    check_results(made, out, chances)
    vocab, width = base.shape[-1], state.shape[-1]
    count, places = made.shape
    if base.dtype != torch.float32 or mix.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TidarError(f"the kernel has no {base.dtype} with {mix.dtype}: use tidar.kernels.reference_chain")
    if not all(t.is_contiguous() for t in (token_table, mix, suppressed, temperature, seed, lengths)):
        raise TidarError("tables and sampling parameters must be contiguous")
    if any(t.stride(-1) != 1 for t in (base, state)):
        raise TidarError("logits and states must be contiguous in their last axis")
    if vocab > TOKEN.value:
        raise TidarError(f"the kernel has no vocabularies above {TOKEN.value}: use tidar.kernels.reference_chain")
    if shortlists is None:
        shortlists = Shortlists.for_step(count, places, device=base.device)
    tokens = shortlists.tokens
    if tokens.shape[:2] != (count, places) or tokens.device != base.device:
        raise TidarError(f"the shortlists were made for {tuple(tokens.shape)} on {tokens.device}: make some for this")
    out = torch.empty(count, places, dtype=torch.int64, device=base.device) if out is None else out
    lists = tokens, shortlists.scores, shortlists.noise
    _shortlist[GROUPS // TOGETHER, places, count](
        base, suppressed, temperature, seed, lengths, rows, *lists, offset, *base.stride()[:2],
        VOCAB=vocab, GROUPS=GROUPS, LANES=lanes(vocab), TOGETHER=TOGETHER, KEPT=KEPT, DEALT=DEALT,
        SAMPLING=sampling, num_warps=TOGETHER, **options(base.device),
    )  # fmt: skip
    fixed = sizes(places, tokens.shape[2], width, mix.element_size())
    _follow[tokens.shape[2] // fixed["ROWS"], places, count](
        state, first, made.view(torch.int8), rows, token_table, mix, *lists, shortlists.following,
        shortlists.choices, shortlists.came, shortlists.arrived, out, chances, *state.stride()[:2], *first.stride(),
        *made.stride(), *out.stride(), *((0, 0) if chances is None else chances.stride()), SURE=SURE,
        KNOWN=KNOWN, SAMPLING=sampling, **fixed,
        **options(base.device),
    )  # fmt: skip
    return out


def sizes(places: int, slots: int, width: int, itemsize: int) -> dict[str, int]:
    """Constants and launch of `_follow`: as many rows as a Hopper matrix instruction takes, or registers hold."""
    padded = max(16, power_of_2(width))
    return {
        "PLACES": places,
        "PLACES_UP": power_of_2(places),
        "W": width,
        "WIDTH": padded,
        "DEPTH": min(padded, 64 if itemsize == 2 else 16),
        "SLOTS": slots,
        "ROWS": 64,
        "num_warps": 8 if itemsize > 2 else 4,  # a second warpgroup computes all gates again
        "num_stages": 4,
    }
