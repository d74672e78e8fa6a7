"""The kernel of `tidar.kernels.step_attention`: a tile of query rows over a split of its keys.

Legend: B rows, L queries, C causal ones, A alternates, P blocks of M masks, Hq = G·Hk query heads, Hk key heads, D
head width.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from tidar.kernels.attention_parts import FLOOR, combine, divided, last_to_come, leave
from tidar.kernels.pdl import begin, release
from tidar.kernels.rotary import columns, turned

__all__ = ["LOG2E", "attention", "join", "place_of"]

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _rows(place, D: tl.constexpr, WIDTH: tl.constexpr, real=None, APART: tl.constexpr = False):
    """Rows of D numbers at pointers ``place``, padded to WIDTH; zeros where not ``real``, whatever memory holds.

    With APART the halves are padded each for itself, as `turned` leaves them.
    """
    column, inside = columns(D, WIDTH, APART)
    place, inside = place[:, None] + column[None, :], inside[None, :]
    if real is not None:
        return tl.load(place, mask=real[:, None] & inside, other=0.0)
    elif WIDTH != D:
        return tl.load(place, mask=inside, other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _scores(q, k, inner, SOFTCAP: tl.constexpr):
    # Triton's default for float32 is tf32: too coarse to decode exactly.
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        score = 2 * tl.sigmoid(2 * inner * score) - 1  # tanh(inner · score)
    return score


@triton.jit
def _update(score, v, acc, peak, total, factor):
    """Take a tile of keys into the running softmax: weighted sum of values, maximum (base 2), sum of weights."""
    new = tl.maximum(peak, tl.max(score, 1) * factor)
    weight = tl.exp2(score * factor - new[:, None])
    shrink = tl.exp2(peak - new)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new, total * shrink + tl.sum(weight, 1)


@triton.jit
def _pages(table, at, length, table_width, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """The pages of the prefix's tile ``at``: one number where a tile lies in a page, else one a key."""
    if PAGE % KEYS == 0:
        # Behind the prefix the number means nothing, but asking needs no length.
        index = at // (PAGE // KEYS)
        return tl.load(table + index, mask=index < table_width, other=0)
    else:
        key = at * KEYS + tl.arange(0, KEYS)
        return tl.load(table + key // PAGE, mask=key < length, other=0)


@triton.jit
def place_of(index, levels, real, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr, PAIRS: tl.constexpr):
    """Of query or key ``index`` of the step: position behind the row's length, and level, for alternates and masks.

    OTHERS alternates stand between causal tokens and blocks of masks, the first of them in PAIRS.
    """
    behind = index - CAUSAL
    block, offset = (behind - OTHERS) // BLOCK, (behind - OTHERS) % BLOCK
    if OTHERS:
        second = tl.where(behind < 2 * PAIRS, behind % 2, 0)
        block, offset = tl.where(behind < OTHERS, behind, OTHERS + block), tl.where(behind < OTHERS, second, offset)
    level = tl.load(levels + block, mask=real & (behind >= 0), other=0).to(tl.int32)
    return tl.where(behind >= 0, level + offset, index), level


@triton.jit
def _block_of(behind, BLOCK: tl.constexpr, OTHERS: tl.constexpr, PAIRS: tl.constexpr):
    """Where the block begins of query ``behind`` the causal ones; a pair of alternates is one, and so is any other."""
    if OTHERS:
        alone = tl.where(behind < 2 * PAIRS, behind // 2 * 2, behind)
        return tl.where(behind < OTHERS, alone, OTHERS + (behind - OTHERS) // BLOCK * BLOCK)
    else:
        return behind // BLOCK * BLOCK


@triton.jit
def _put(place, value, wanted, D: tl.constexpr, WIDTH: tl.constexpr, APART: tl.constexpr):
    """Store at pointers ``place``, where ``wanted``, what `_rows` would load."""
    column, inside = columns(D, WIDTH, APART)
    tl.store(place[:, None] + column[None, :], value, mask=wanted[:, None] & inside[None, :])


@triton.jit
def _give(
    out, value, line, row, head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store query rows ``line`` of the output, if there are such."""
    column = tl.arange(0, WIDTH)
    base = ((row * QUERIES + line // GROUP) * HEADS * GROUP + head * GROUP + line % GROUP) * D
    inside = (line < QUERIES * GROUP)[:, None] & (column < D)[None, :]
    tl.store(out + base[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def attention(
    q, k, v, q_norm, k_norm, cos, sin, counts, k_pages, v_pages, table, lengths, levels, sinks,
    out, part, peaks, totals, arrived, inner, factor, eps, positions, table_step, table_width,
    Q_STEPS: tl.constexpr, K_STEPS: tl.constexpr, V_STEPS: tl.constexpr, PAGE_STEPS: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    OTHERS: tl.constexpr, PAIRS: tl.constexpr, LEVEL_STEP: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr,
    HELD: tl.constexpr, FEW: tl.constexpr, FLIGHT: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of query rows over a split of its keys; the last split to come to a tile joins their parts, or, APART,
    `join` does.

    With ``cos`` queries and keys come as projected, and one tile of each row and key head writes the cache. With
    ``counts`` alone, causal keys are in the cache and are taken from there, in tiles of the text as it stands in its
    pages, each tile to the split that its place says: so a query's sums do not depend on the step that it is in.
    """
    TURN: tl.constexpr = cos is not None
    ALIGNED: tl.constexpr = cos is None and counts is not None
    begin(PDL)
    tile, pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    length = tl.load(lengths + row)
    if BLOCK:
        levels += row * LEVEL_STEP

    # Own keys: the causal tokens, then alternates and blocks of masks that have a query in this tile; no other can be
    # seen.
    last = (tl.minimum(tile * ROWS + ROWS, QUERIES * GROUP) - 1) // GROUP
    clean = tl.minimum(last + 1, CAUSAL)
    skipped, count, known = 0, clean, length
    if ALIGNED:
        known, clean, count = length + tl.minimum(clean, tl.load(counts + row)), clean * 0, clean * 0
    if BLOCK:
        from_block = _block_of(tl.maximum(tile * ROWS // GROUP - CAUSAL, 0), BLOCK, OTHERS, PAIRS)
        until = _block_of(tl.maximum(last - CAUSAL, 0), BLOCK, OTHERS, PAIRS) + BLOCK
        if OTHERS:
            until = tl.where(last - CAUSAL < OTHERS, last - CAUSAL + 1, until)
        skipped = CAUSAL + from_block - clean
        count = clean + tl.where(last < CAUSAL, 0, until) - from_block

    # Tiles of own keys, then of the prefix, are dealt to the splits in turn. Which of the prefix comes first to a split
    # does not depend on the length (without a window), so its page can be asked for before the length is known.
    own, first = tl.cdiv(count, OWN), 0
    if WINDOW:
        first = tl.maximum(length - WINDOW + 1, 0) // KEYS
    start, end = first + split - own + tl.cdiv(tl.maximum(own - split, 0), SPLITS) * SPLITS, tl.cdiv(known, KEYS)
    if ALIGNED:
        start = first + (split + SPLITS - first % SPLITS) % SPLITS
    pages = table + row * table_step
    ahead = _pages(pages, start, known, table_width, PAGE, KEYS)

    # L·G query rows, a query's G heads together. A tile is filled up with copies of the last row, never stored.
    lines = tile * ROWS + tl.arange(0, ROWS)
    line = tl.minimum(lines, QUERIES * GROUP - 1)
    query, query_head = line // GROUP, head * GROUP + line % GROUP
    # What a query sees of its step: causal tokens before `stop`, masks from `mates` on. `place`: position - length.
    place, stop = query, query + 1
    if BLOCK:
        place, level = place_of(query, levels, True, CAUSAL, BLOCK, OTHERS, PAIRS)
        stop = tl.where(query < CAUSAL, stop, level)
        block = _block_of(query - CAUSAL, BLOCK, OTHERS, PAIRS)
        mates = tl.where(query < CAUSAL, QUERIES, CAUSAL + block)

    used = tl.minimum(own + end - first, SPLITS)
    if ALIGNED:
        used = used * 0 + SPLITS  # which splits have a tile depends on where the text stands
    if APART:
        used = used * 0 + SPLITS  # `join` reads the parts of all, also those that no key fell to
    if split >= used:
        return

    asked = q + row * Q_STEPS[0] + (query * Q_STEPS[1] + query_head * Q_STEPS[2])
    if TURN:
        # The first tile that sees all causal keys writes them to the cache: each is taken by one of its splits. Behind
        # the table's last page there is another row's table.
        written = tl.minimum(tl.minimum(tl.load(counts + row), CAUSAL), table_width * PAGE - length)
        written = tl.where(tile == (CAUSAL * GROUP - 1) // ROWS, written, 0)
        at_query = tl.minimum(length + place, positions - 1)[:, None]
        queries = turned(asked[:, None], True, q_norm, eps, cos, sin, at_query, D, WIDTH).to(q.dtype.element_ty)
    else:
        queries = _rows(asked, D, WIDTH)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    peak, total = tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32)
    if sinks is not None and split == 0:
        # A sink is a key with a value of zero; one split alone may count it.
        peak = tl.load(sinks + query_head).to(tl.float32) * LOG2E
        total += 1.0

    # Prefix. Page numbers are fetched a tile ahead by hand: loads that wait for loads would halve the pipeline.
    k_pages += head * PAGE_STEPS[2]
    v_pages += head * PAGE_STEPS[2]
    offset = tl.arange(0, KEYS)
    for at in range(start, end, SPLITS):
        if PAGE % KEYS == 0:  # so written, addresses are one plus constants
            slot = at * KEYS % PAGE + offset
        else:
            slot = (at * KEYS + offset) % PAGE
        place_in_pages = ahead.to(tl.int64) * PAGE_STEPS[0] + slot * PAGE_STEPS[1]
        ahead = _pages(pages, at + SPLITS, known, table_width, PAGE, KEYS)
        # Slots behind the prefix may hold anything, NaN too: they must not even be multiplied by zero.
        there = at * KEYS + offset < known
        score = _scores(queries, _rows(k_pages + place_in_pages, D, WIDTH, there, TURN), inner, SOFTCAP)
        values = _rows(v_pages + place_in_pages, D, WIDTH, there)
        seen = there[None, :]
        if ALIGNED:
            seen = seen & ((at * KEYS + offset)[None, :] < (length + stop)[:, None])
        if WINDOW:
            seen = seen & ((at * KEYS + offset)[None, :] > (length + place - WINDOW)[:, None])
        acc, peak, total = _update(tl.where(seen, score, -float("inf")), values, acc, peak, total, factor)

    # Own keys.
    k_own, v_own = k + row * K_STEPS[0] + head * K_STEPS[2], v + row * V_STEPS[0] + head * V_STEPS[2]
    for at in tl.range(split * OWN, count, SPLITS * OWN, num_stages=1 if TURN else 2):
        index = at + tl.arange(0, OWN)
        key = tl.where(index < clean, index, index + skipped)
        here = index < count
        given = k_own + key * K_STEPS[1]
        if TURN:
            slot, fresh = length + index, index < written
            page = tl.load(pages + slot // PAGE, mask=fresh, other=0).to(tl.int64)
            place_of_key = key
            if BLOCK:
                place_of_key, _ = place_of(key, levels, here, CAUSAL, BLOCK, OTHERS, PAIRS)
            at_key = tl.minimum(length + place_of_key, positions - 1)[:, None]
            new_k = turned(given[:, None], here[:, None], k_norm, eps, cos, sin, at_key, D, WIDTH)
            new_k = new_k.to(k.dtype.element_ty)
        else:
            new_k = _rows(given, D, WIDTH, here)
        new_v = _rows(v_own + key * V_STEPS[1], D, WIDTH, here)
        text = key[None, :] < stop[:, None]
        seen = text
        if BLOCK:
            mate = key[None, :] - mates[:, None]
            mates_there = mate < BLOCK
            if OTHERS:  # an alternate sees itself, and whom it follows
                masked = (query >= CAUSAL + OTHERS)[:, None]
                mates_there = (masked & mates_there) | ((key[None, :] <= query[:, None]) & (masked == 0))
            seen = text | ((mate >= 0) & mates_there)
        if WINDOW:
            away = tl.where(text, place[:, None] - key[None, :], query[:, None] - key[None, :])
            seen = seen & (away < WINDOW)
        score = tl.where(seen & here[None, :], _scores(queries, new_k, inner, SOFTCAP), -float("inf"))
        acc, peak, total = _update(score, new_v, acc, peak, total, factor)
        if TURN:
            place_in_cache = page * PAGE_STEPS[0] + slot % PAGE * PAGE_STEPS[1]
            _put(k_pages + place_in_cache, new_k, fresh, D, WIDTH, True)
            _put(v_pages + place_in_cache, new_v, fresh, D, WIDTH, False)

    release(PDL)
    if SPLITS == 1:
        _give(out, divided(acc, total), lines, row, head, HEADS, GROUP, QUERIES, D, WIDTH)
    elif APART:
        meeting = pair * tl.num_programs(0) + tile
        mine = (meeting.to(tl.int64) * SPLITS + split) * HELD
        leave(part + mine * D, peaks + mine, totals + mine, acc, peak, total, HELD, D)
    else:
        meeting = pair * tl.num_programs(0) + tile
        kept = meeting.to(tl.int64) * SPLITS * HELD
        mine = kept + split * HELD
        leave(part + mine * D, peaks + mine, totals + mine, acc, peak, total, HELD, D)
        if last_to_come(arrived + meeting, used):
            for at in range(0, HELD, FEW):
                few = at + tl.arange(0, FEW)
                joined = combine(
                    part + kept * D, peaks + kept, totals + kept, few, used, HELD, D, WIDTH, SPLITS, FLIGHT
                )
                _give(out, joined, tile * ROWS + few, row, head, HEADS, GROUP, QUERIES, D, WIDTH)


@triton.jit
def join(
    out, part, peaks, totals,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, HELD: tl.constexpr, FEW: tl.constexpr, FLIGHT: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """FEW query rows of a tile, from the parts that its splits left."""
    begin(PDL)
    tile, pair = tl.program_id(0), tl.program_id(1)
    kept = (pair * tl.num_programs(0) + tile).to(tl.int64) * SPLITS * HELD
    few = tl.program_id(2) * FEW + tl.arange(0, FEW)
    joined = combine(part + kept * D, peaks + kept, totals + kept, few, SPLITS, HELD, D, WIDTH, SPLITS, FLIGHT)
    _give(out, joined, tile * ROWS + few, (pair // HEADS).to(tl.int64), pair % HEADS, HEADS, GROUP, QUERIES, D, WIDTH)
