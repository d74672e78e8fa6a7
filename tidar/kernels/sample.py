"""`tidar.sampling.process` and `sample` as one Triton kernel: logits in, tokens out, nothing stored in between.

The vocabulary is never sorted. What top-k and top-p keep is a prefix of the order by descending score, lower ids first
among equals, and a token's place in it is an integer *key*: the bits of its score above its id. So top-k is the key
below which k tokens lie, found by bisection. Top-p needs no search at all: the best token by score plus noise is the
sample if the tokens before it have less than top_p of the mass; if not, no token from it on is kept, and the best of
those before it is next. Each attempt succeeds with the probability that top-p keeps, so that few are needed:
1 + ln(1 / top_p) on average at most.

A program takes a row, in chunks. A vocabulary of one chunk stays in registers; a larger one is read again for each
pass, from the L2 cache. A row's token depends on its own logits and parameters only, and on the vocabulary's size.

Legend: B rows (requests), R logit rows each, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.greedy import greedy, logits_of, place_of
from tidar.kernels.noise import gumbel, words
from tidar.kernels.params import DeviceParams
from tidar.kernels.pdl import THEN, begin, options
from tidar.kernels.workspace import power_of_2

__all__ = ["sample"]

WHOLE = 8192  # the largest vocabulary that stays in registers
CHUNK = 4096  # tokens taken at a time of a larger one
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
def _sample(
    logits, lengths, temperatures, top_ks, top_ps, penalties, seeds, suppressed, seen, drafts, places, out, bad,
    first, logits_step, row_step, seen_step, drafts_step, places_step,
    PLACES: tl.constexpr, PAIRS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr,
    SAMPLING: tl.constexpr, FILTERING: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row."""
    begin(PDL)
    r, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    penalty = 1.0
    if seen is not None:
        seen += b * seen_step
        penalty = tl.load(penalties + b)
    if drafts is not None:
        drafts += b * drafts_step
    place, count = place_of(r, places, b * places_step, PLACES, PAIRS)
    given = (logits + b * logits_step + r.to(tl.int64) * row_step, suppressed, seen, drafts, count, penalty)

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


def chunk_of(vocab: int) -> int:
    """Tokens a program takes at a time: all of them, if they fit in its registers."""
    return max(16, power_of_2(vocab)) if vocab <= WHOLE else CHUNK


def warps(chunk: int) -> int:
    """Warps of a program: 8 tokens a thread, or 16 in the largest chunk, which spills a few registers of sm_90."""
    return min(max(chunk // 256, 1), 16)


def sample(
    logits: Tensor,
    params: DeviceParams,
    lengths: Tensor,
    *,
    first: int,
    suppressed: Tensor | None = None,
    seen: Tensor | None = None,
    drafts: Tensor | None = None,
    others: Tensor | None = None,
    pairs: int = 0,
    sampling: bool,
    filtering: bool,
    bad: Tensor | None = None,
    out: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The tokens of `tidar.sampling.sample` after `tidar.sampling.process`, without a wait for the device.

    Row r of request b samples the token at position ``lengths[b] + first + r``. Equal to the two functions token for
    token, except that the sum that top-p cuts off may round differently: it decides otherwise in one row of millions.

    Args:
        logits: (B, R, V) float32, contiguous in V; not modified.
        params: B rows.
        lengths: (B,) int32.
        first: position of row 0 from ``lengths``.
        suppressed: (V,) bool, tokens that are never produced.
        seen: (B, V) bool, contiguous in V, the tokens of the committed text: turns repetition penalties on.
        drafts: (B, at least R - A) int64, contiguous in a row: row r has seen the first r + 1 of them too.
        others: (B, at least A) int64, contiguous in A: the last A rows are alternates behind so many drafts, and have
            seen these (`tidar.kernels.accept.accept`). What they have seen beside decides over drafts only.
        pairs: how many pairs the alternates begin with, of which the second stands a position further.
        sampling: whether any temperature may be above 0.
        filtering: whether any row with a temperature may have top-k or top-p on.
        bad: (1,) int32, set to 1 if a row's logits have a NaN or an infinite maximum, never to 0. The row's token is 0.
        out: (B, R) int64 contiguous, where to write; give it where nothing may be allocated.
        chunk: tokens a program takes at a time, a power of 2 of at least 16.

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    rows, places, vocab = logits.shape
    out = torch.empty(rows, places, dtype=torch.int64, device=logits.device) if out is None else out
    told = 0 if others is None else others.shape[1]
    if others is not None and (others.dtype != torch.int64 or len(others) != rows or others.stride(1) != 1):
        raise TidarError(f"others must be int64, contiguous in each of {rows} rows")
    if not 0 <= 2 * pairs <= told < places:
        raise TidarError(f"{places} rows are not drafts and {told} alternates that begin with {pairs} pairs")
    _check(logits, params, lengths, suppressed, seen, drafts, told, bad, out)
    chunk = chunk_of(vocab) if chunk is None else chunk
    if chunk < 16 or power_of_2(chunk) != chunk:
        raise TidarError(f"a chunk must be a power of 2 of at least 16, not {chunk}")
    masked, known = (None if t is None else t.view(torch.uint8) for t in (suppressed, seen))
    if not sampling and vocab > chunk:
        return greedy(logits, params.penalty, masked, known, drafts, others, pairs, out, bad, chunk)
    _sample[places, rows](
        logits, lengths, *params.tensors, masked, known, drafts, others, out, bad,
        first, *logits.stride()[:2], 0 if seen is None else seen.stride(0), 0 if drafts is None else drafts.stride(0),
        0 if others is None else others.stride(0), PLACES=places - told, PAIRS=pairs,
        VOCAB=vocab, CHUNK=chunk, SAMPLING=sampling, FILTERING=sampling and filtering,
        # A product must be rounded before it is added to, as everywhere else.
        num_warps=warps(chunk), enable_fp_fusion=False, **options(logits.device, when=THEN),
    )  # fmt: skip
    return out


def _check(
    logits: Tensor,
    params: DeviceParams,
    lengths: Tensor,
    suppressed: Tensor | None,
    seen: Tensor | None,
    drafts: Tensor | None,
    others: int,
    bad: Tensor | None,
    out: Tensor,
) -> None:
    rows, places, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(2) != 1:
        raise TidarError(f"logits must be float32 and contiguous in the vocabulary, not {logits.dtype}")
    if any(t.shape != (rows,) for t in params.tensors):
        raise TidarError(f"parameters must be those of {rows} rows")
    if lengths.shape != (rows,) or lengths.dtype != torch.int32:
        raise TidarError(f"lengths must be int32 of shape {(rows,)}")
    if suppressed is not None and (suppressed.shape != (vocab,) or suppressed.dtype != torch.bool):
        raise TidarError(f"suppressed must be bool of shape {(vocab,)}")
    if seen is not None and (seen.shape != (rows, vocab) or seen.dtype != torch.bool or seen.stride(1) != 1):
        raise TidarError(f"seen must be bool of shape {(rows, vocab)}, contiguous in the vocabulary")
    if drafts is not None and (
        drafts.dtype != torch.int64
        or drafts.shape[0] != rows
        or drafts.shape[1] < places - others
        or drafts.stride(1) != 1
    ):
        raise TidarError(
            f"drafts must be int64, at least {places - others} for each of {rows} rows, contiguous in a row"
        )
    if bad is not None and (bad.numel() != 1 or bad.dtype != torch.int32):
        raise TidarError("bad must be one int32")
    if out.shape != (rows, places) or out.dtype != torch.int64 or not out.is_contiguous():
        raise TidarError(f"out must be contiguous, int64 and {(rows, places)}")
