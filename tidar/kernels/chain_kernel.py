"""The kernels of `tidar.kernels.chain`: shortlists, what follows their tokens, and the walk along it.

Legend: B rows, R drafts, V vocabulary, W width of the transition, G groups of K listed tokens, S = G·K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidar.kernels.attention_parts import FLOOR, last_to_come
from tidar.kernels.noise import gumbel, words
from tidar.kernels.pdl import begin, finish, start
from tidar.kernels.reference_step import SLOT_BITS

__all__ = ["TOKEN", "follow", "shortlist"]

LAST = tl.constexpr(2**31 - 1)
LEAST = tl.constexpr(-(2**31))  # below the order of any score
BITS = tl.constexpr(SLOT_BITS)
TOKEN = tl.constexpr(2**SLOT_BITS - 1)


@triton.jit
def _order(score):
    """Integers that order as the scores do."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    return bits ^ ((bits >> 31) & LAST)


@triton.jit
def shortlist(
    base, suppressed, temperature, seed, lengths, levels, tokens, scores, noise, offset, base_row, base_place,
    level_row,
    STRIDE: tl.constexpr, FIRST: tl.constexpr, QUERIES: tl.constexpr, BESIDE: tl.constexpr,
    VOCAB: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr, KEPT: tl.constexpr,
    DEALT: tl.constexpr, SAMPLING: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """What some groups of a place name; BESIDE the kernel before."""
    start(PDL, BESIDE)
    part, mask, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    block, place = mask // STRIDE, mask % STRIDE
    group, lane = part * TOGETHER + tl.arange(0, TOGETHER), tl.arange(0, LANES)
    dealt = (lane // DEALT * (GROUPS * DEALT) + lane % DEALT)[None, :] + group[:, None] * DEALT
    logits = base + row * base_row + (FIRST + mask).to(tl.int64) * base_place
    if SAMPLING:  # asked for before it is needed, as all that follows a loop
        heat, key = tl.load(temperature + row).to(tl.float32), tl.load(seed + row)
        position = tl.load(lengths + row).to(tl.int64) + offset + place
        if levels is not None:
            position += tl.load(levels + row * level_row + block)
    order = tl.full((TOGETHER, LANES), LEAST, tl.int32)
    token = dealt
    for chunk in tl.range(0, VOCAB, GROUPS * LANES, num_stages=4):
        new = chunk + dealt
        score = tl.load(logits + new, mask=new < VOCAB, other=float("-inf"), cache_modifier=".cg")
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
    slot = ((row * QUERIES + FIRST + mask) * tl.num_programs(0) + part) * (TOGETHER * KEPT)
    slot += tl.arange(0, TOGETHER * KEPT)
    tl.store(tokens + slot, chosen)
    tl.store(scores + slot, value)
    if SAMPLING:
        bits = tl.reshape(words(key, position, chosen // 4), (TOGETHER * KEPT, 4))
        own = tl.arange(0, 4)[None, :] == (chosen % 4)[:, None]
        tl.store(noise + slot, heat * gumbel(tl.sum(tl.where(own, bits, 0), 1)))
    finish(PDL, BESIDE)


@triton.jit
def follow(
    state, first, made, given, chosen_rows, token_table, mix, tokens, scores, noise, following, choices, came_from,
    its_list, arrived, out, chances, state_row, state_place, first_row, made_row, made_place, out_row, out_place,
    chance_row, chance_place,
    PLACES: tl.constexpr, PLACES_UP: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, KNOWN: tl.constexpr,
    SAMPLING: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The successors, within a place's shortlist, of some tokens of the one before; the last to come to a row walks."""
    begin(PDL)
    part, place, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    here = (row * PLACES + place) * SLOTS
    slot, line, k = tl.arange(0, SLOTS), part * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)[None, :]
    own, last, at_state = row * PLACES + place, row * PLACES + place - 1, row * state_row + place * state_place
    if chosen_rows is not None:
        last = tl.load(chosen_rows + own - 1, mask=place > 0, other=0).to(tl.int64)
        own = tl.load(chosen_rows + own).to(tl.int64)
        at_state = own * state_row
    own, last, known = own * SLOTS, last * SLOTS, 0
    certain = tl.load(first + row * first_row)
    if given is not None:
        known = tl.load(given + row)
        certain = tl.load(out + row * out_row + (known - 1) * out_place, mask=known > 0, other=certain)
    token = tl.load(tokens + own + slot).to(tl.int64)
    # The first place that is chosen has one token before it, which stands for all.
    before = tl.load(tokens + last + line, mask=place > known, other=0).to(tl.int64)
    before = tl.where(place > known, before, certain)
    state += at_state

    acc = tl.zeros((ROWS, SLOTS), tl.float32)
    for d in range(0, WIDTH, DEPTH):
        leaning = tl.load(token_table + before[:, None] * W + (d + k), mask=d + k < W, other=0.0).to(tl.float32)
        gate = leaning + tl.load(state + d + k, mask=d + k < W, other=0.0)
        weight = tl.load(mix + token[:, None] * W + (d + k), mask=d + k < W, other=0.0)
        gate = (gate * tl.sigmoid(gate)).to(weight.dtype)
        # Triton's default for float32 is tf32, which would choose other drafts than the twin.
        acc = tl.dot(gate, tl.trans(weight), acc, input_precision="ieee")
    acc += tl.load(scores + own + slot)[None, :]
    acc = tl.where(acc == acc, acc, float("-inf"))  # NaN would equal nothing
    peak = tl.minimum(tl.maximum(tl.max(acc, 1), FLOOR), -FLOOR)  # infinities from one another are NaN
    mass = tl.maximum(tl.sum(tl.exp(acc - peak[:, None]), 1), 1.0)
    if SAMPLING:
        # logits / T + noise has its maximum where logits + T · noise has, which also serves T = 0 and overflows never.
        acc += tl.load(noise + own + slot)[None, :]
    top = tl.max(acc, 1)
    word = (slot << BITS | token.to(tl.int32))[None, :]
    leading = tl.min(tl.where(acc == top[:, None], word, LAST), 1)
    odds = top - peak - tl.log(mass)
    low = odds.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(following + here + line, leading.to(tl.int64) << 32 | low)

    if last_to_come(arrived + row, PLACES * (SLOTS // ROWS)):
        places, every = tl.arange(0, PLACES_UP), tl.arange(0, PLACES_UP * SLOTS)
        real = places < PLACES
        kept = tl.load(made + row * made_row + places * made_place, mask=real, other=0) != 0
        whose = row * PLACES + places
        if chosen_rows is not None:
            whose = tl.load(chosen_rows + whose, mask=real, other=0).to(tl.int64)
        # Look-ups wait for one another. So all successors are read at once before, which brings them into the L1 cache.
        # None is negative: the walk starts at slot 0, and not before they are there.
        table = following + row * PLACES * SLOTS
        at = tl.minimum(tl.max(tl.load(table + every, mask=every < PLACES * SLOTS, other=0)), 0).to(tl.int32)
        walked, came = tl.zeros((PLACES_UP,), tl.int64), tl.zeros((PLACES_UP,), tl.int32)
        for j in range(PLACES):
            successor = tl.load(table + j * SLOTS + at)
            walked = tl.where(places == j, successor, walked)
            came = tl.where(places == j, at, came)
            at = (successor >> (32 + BITS)).to(tl.int32)  # where the next draft is the first to be chosen, any will do
        draft = tl.where(kept, walked >> 32 & TOKEN, 0)
        tl.store(out + row * out_row + places * out_place, draft, mask=real & (places >= known))
        if chances is not None:
            odd = walked.to(tl.int32).to(tl.float32, bitcast=True)
            if SAMPLING:  # how probable a draft is does not depend on its luck
                luck_at = whose * SLOTS + (walked >> (32 + BITS)).to(tl.int32)
                odd -= tl.load(noise + luck_at, mask=real, other=0.0)
            chance = tl.where(places < known, KNOWN, tl.where(kept, tl.exp(odd), 0.0))
            tl.store(chances + row * chance_row + places * chance_place, chance, mask=real)
        if choices is not None:
            tl.store(came_from + row * PLACES + places, came, mask=real)
            tl.store(its_list + row * PLACES + places, whose.to(tl.int32), mask=real)
    # Behind the walk, which need not wait for so many bytes.
    if choices is not None:
        tl.store(choices + (here + line)[:, None] * SLOTS + slot[None, :], acc)
