"""The kernel of `tidar.kernels.sample`: one program a row, which draws its token.

Legend: B rows (requests), R logit rows each, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidar.kernels.greedy import logits_of, place_of, row_of
from tidar.kernels.noise import gumbel, words
from tidar.kernels.pdl import begin

__all__ = ["draw"]

LAST = tl.constexpr(2**63 - 1)  # above all keys
LOWEST = tl.constexpr(-4.0)  # below the best score plus noise: scores go up to 0, noise down to -3.13
NEAR = tl.constexpr(16)  # tokens too many up to which top-k takes them off one by one


@triton.jit
def _scores(given, held, highest, temperature, ids, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """Scores of a chunk, at most 0, and the keys of its tokens."""
    if VOCAB <= CHUNK:
        scores = held
    else:
        scores = tl.div_rn(logits_of(given, ids, VOCAB) - highest, temperature)
    return scores, _keys(scores, ids)


@triton.jit
def _keys(scores, ids):
    """Integers in the order of the tokens: without its sign, a lower score has a higher float, with higher bits."""
    return (tl.abs(scores).to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids


@triton.jit
def _before(bound, given, held, highest, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The tokens whose keys are below ``bound``: how many there are, their mass, and the last key."""
    count, mass = tl.zeros((CHUNK,), tl.int32), tl.zeros((CHUNK,), tl.float64)
    last = tl.zeros((CHUNK,), tl.int64)
    for start in tl.range(0, VOCAB, CHUNK, num_stages=3):
        ids = start + tl.arange(0, CHUNK)
        scores, keys = _scores(given, held, highest, temperature, ids, VOCAB, CHUNK)
        inside = keys < bound
        count += inside.to(tl.int32)
        mass += tl.where(inside, tl.exp(scores), 0.0).to(tl.float64)
        last = tl.maximum(last, tl.where(inside, keys, 0))
    return tl.sum(count), tl.sum(mass), tl.max(last)


@triton.jit
def _top_k(k, keys, given, held, highest, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The key below which the first k tokens lie, or all if there are fewer; and their mass.

    ``keys`` are those of the best token of each lane, with one chunk of all tokens. The k-th of these cannot lie before
    the k-th of all, so it bounds the search, and it lies behind only if two of the first k share a lane.
    """
    low, bound = tl.full((), 0, tl.int64), tl.full((), LAST, tl.int64)
    count = tl.full((), CHUNK, tl.int32)
    while count > k:
        middle = low + ((bound - low) >> 1)
        found = tl.sum((keys < middle).to(tl.int32))
        low = tl.where(found < k, middle, low)
        bound = tl.where(found < k, bound, middle)
        count = tl.where(found < k, count, found)

    low = tl.full((), 0, tl.int64)
    count, mass, last = _before(bound, given, held, highest, temperature, VOCAB, CHUNK)
    while count > k:  # never if there is one chunk
        probe = tl.where(count - k > NEAR, low + ((bound - low) >> 1), last)
        found, its_mass, its_last = _before(probe, given, held, highest, temperature, VOCAB, CHUNK)
        low = tl.where(found < k, probe, low)
        bound = tl.where(found < k, bound, probe)
        mass, last = tl.where(found < k, mass, its_mass), tl.where(found < k, last, its_last)
        count = tl.where(found < k, count, found)
    return bound, mass


@triton.jit
def _best(bound, seed, position, given, held, highest, temperature, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """The key of the best token by score plus noise, of those with keys below ``bound``."""
    best, best_key = tl.full((), LOWEST, tl.float32), tl.full((), 0, tl.int64)
    for start in range(0, VOCAB, CHUNK):
        ids = start + tl.arange(0, CHUNK)
        scores, keys = _scores(given, held, highest, temperature, ids, VOCAB, CHUNK)
        bits = words(seed, position, start // 4 + tl.arange(0, CHUNK // 4))
        inside, hope = keys < bound, True
        if VOCAB > CHUNK:
            # Logarithms in float64 are slow, and few chunks need them. The noise is -log(-log(1 - v)), so a token
            # reaches `best` only if -log(1 - v), which is above v, is at most exp(score - best). A thousandth covers
            # rounding.
            near = inside & (bits.to(tl.float32) * 2.0**-32 <= 1.001 * tl.exp(scores - best))
            hope = tl.max(near.to(tl.int32)) > 0
        if hope:
            values = tl.where(inside, scores + gumbel(bits), -float("inf"))
            top = tl.max(values)
            first = tl.min(tl.where(values == top, ids, VOCAB))
            key = tl.max(tl.where(ids == first, keys, 0))
            best_key = tl.where(top > best, key, best_key)
            best = tl.maximum(best, top)
    return best_key


@triton.jit
def draw(
    logits, rows, lengths, temperatures, top_ks, top_ps, penalties, seeds, suppressed, seen, drafts, places, out, bad,
    first, logits_step, row_step, seen_step, drafts_step, places_step,
    PLACES: tl.constexpr, PAIRS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr,
    SAMPLING: tl.constexpr, FILTERING: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The token of one row."""
    begin(PDL)
    r, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    penalty = 1.0
    if seen is not None:
        seen += b * seen_step
        penalty = tl.load(penalties + b)
    if drafts is not None:
        drafts += b * drafts_step
    place, count = place_of(r, places, b * places_step, PLACES, PAIRS)
    row = row_of(logits, rows, r, b, logits_step, row_step, tl.num_programs(0))
    given = (row, suppressed, seen, drafts, count, penalty)

    # The best token of each lane, the first among equals. A NaN becomes infinite, so that it is not overlooked.
    peak, at = tl.full((CHUNK,), -float("inf"), tl.float32), tl.arange(0, CHUNK)
    for start in tl.range(0, VOCAB, CHUNK, num_stages=3):
        ids = start + tl.arange(0, CHUNK)
        x = logits_of(given, ids, VOCAB)
        x = tl.where(x == x, x, float("inf"))
        at = tl.where(x > peak, ids, at)
        peak = tl.maximum(peak, x)
    highest = tl.max(peak)
    token = tl.min(tl.where(peak == highest, at, VOCAB))
    fine = tl.abs(highest) < float("inf")

    if SAMPLING:
        temperature = tl.load(temperatures + b)
        if fine & (temperature > 0):
            seed, position = tl.load(seeds + b), tl.load(lengths + b).to(tl.int64) + first + place
            held = tl.div_rn(peak - highest, temperature)
            key = tl.full((), LAST, tl.int64)
            limit = float("inf")
            if FILTERING:
                k, p = tl.load(top_ks + b), tl.load(top_ps + b)
                k = tl.where((k > 0) & (k < VOCAB), k, 2**31 - 1)
                key, mass = _top_k(k, _keys(held, at), given, held, highest, temperature, VOCAB, CHUNK)
                # The first token has a mass of 1, and is always kept.
                limit = tl.where(p < 1, tl.maximum(p * mass.to(tl.float32), 1e-30), limit)
            tried = False
            while not tried:
                key = _best(key, seed, position, given, held, highest, temperature, VOCAB, CHUNK)
                tried = True
                if FILTERING and limit < float("inf"):
                    _, ahead, _ = _before(key, given, held, highest, temperature, VOCAB, CHUNK)
                    tried = ahead.to(tl.float32) < limit
            token = (key & 0xFFFFFFFF).to(tl.int32)

    tl.store(out + b * tl.num_programs(0) + r, tl.where(fine, token, 0).to(tl.int64))
    if bad is not None:
        tl.store(bad, 1, mask=~fine)
