"""Greedy tokens of large vocabularies: many programs share a row, and one more launch finds the best of their bests.

One program a row would read 600 KB alone, at a hundredth of the memory's rate. Part of `tidar.kernels.sample`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.pdl import THEN, begin, options
from tidar.kernels.workspace import power_of_2

__all__ = ["best_of", "greedy", "logits_of", "penalised", "place_of", "plain_of", "row_of"]


@triton.jit
def row_of(logits, rows, r, b, logits_step, row_step, count):
    """Where row r of request b begins, of ``count`` of them; or the one that is chosen for it."""
    if rows is not None:
        row = logits + tl.load(rows + b * count + r).to(tl.int64) * row_step
    else:
        row = logits + b * logits_step + r.to(tl.int64) * row_step
    return row


@triton.jit
def plain_of(row, suppressed, ids, VOCAB: tl.constexpr):
    """Logits of a chunk after suppression; -inf behind the vocabulary."""
    inside = ids < VOCAB
    x = tl.load(row + ids, mask=inside, other=-float("inf"))
    if suppressed is not None:
        x = tl.where(tl.load(suppressed + ids, mask=inside, other=0) != 0, -float("inf"), x)
    return x


@triton.jit
def penalised(x, seen, drafts, count, penalty, ids, VOCAB: tl.constexpr):
    """Logits of a chunk after the penalty of what was seen, the first ``count`` drafts included."""
    if seen is not None:
        inside = ids < VOCAB
        known = tl.load(seen + ids, mask=inside, other=0) != 0
        if drafts is not None:
            for j in range(count):
                known |= ids == tl.load(drafts + j)
        x = tl.where(known, tl.where(x < 0, x * penalty, tl.div_rn(x, penalty)), x)
    return x


@triton.jit
def logits_of(given, ids, VOCAB: tl.constexpr):
    """Logits of a chunk after suppression and penalty; -inf behind the vocabulary."""
    row, suppressed, seen, drafts, count, penalty = given
    return penalised(plain_of(row, suppressed, ids, VOCAB), seen, drafts, count, penalty, ids, VOCAB)


@triton.jit
def best_of(x, ids, LAST: tl.constexpr):
    """The highest of some numbers, none of them NaN, and the lowest of its ids, which are at most ``LAST``."""
    peak = tl.max(x)
    return peak, tl.min(tl.where(x == peak, ids, LAST))


@triton.jit
def place_of(r, levels, at, PLACES: tl.constexpr, PAIRS: tl.constexpr):
    """Place of row r's token behind the others of its step, and how many drafts it has seen."""
    place, count = r, r + 1
    if levels is not None:
        other = r - PLACES
        level = tl.load(levels + at + other, mask=other >= 0, other=0).to(tl.int32)
        place = tl.where(other >= 0, level + tl.where(other < 2 * PAIRS, other % 2, 0), place)
        count = tl.where(other >= 0, level, count)
    return place, count


@triton.jit
def _peaks(
    logits, rows, penalties, suppressed, seen, drafts, places, peaks, ids, logits_step, row_step, seen_step,
    drafts_step, places_step,
    PLACES: tl.constexpr, PAIRS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """The best token of a chunk of a row."""
    begin(PDL)
    part, r, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    penalty = 1.0
    if seen is not None:
        seen += b * seen_step
        penalty = tl.load(penalties + b).to(tl.float32)
    if drafts is not None:
        drafts += b * drafts_step
    _, count = place_of(r, places, b * places_step, PLACES, PAIRS)
    row = row_of(logits, rows, r, b, logits_step, row_step, tl.num_programs(1))
    given = (row, suppressed, seen, drafts, count, penalty)
    token = part * CHUNK + tl.arange(0, CHUNK)
    x = logits_of(given, token, VOCAB)
    x = tl.where(x == x, x, float("inf"))  # a NaN must not be overlooked
    peak, first = best_of(x, token, VOCAB)
    at = (b * tl.num_programs(1) + r) * tl.num_programs(0) + part
    tl.store(peaks + at, peak)
    tl.store(ids + at, first)


@triton.jit
def _best(peaks, ids, out, bad, PARTS: tl.constexpr, PARTS_UP: tl.constexpr, PDL: tl.constexpr) -> None:
    begin(PDL)
    row, part = tl.program_id(0), tl.arange(0, PARTS_UP)
    peak = tl.load(peaks + row * PARTS + part, mask=part < PARTS, other=-float("inf"))
    token = tl.load(ids + row * PARTS + part, mask=part < PARTS, other=2**31 - 1)
    highest, found = best_of(peak, token, 2**31 - 1)
    fine = tl.abs(highest) < float("inf")
    tl.store(out + row, tl.where(fine, found, 0).to(tl.int64))
    if bad is not None:
        tl.store(bad, 1, mask=~fine)


def greedy(
    logits: Tensor,
    rows: Tensor | None,
    penalty: Tensor,
    suppressed: Tensor | None,
    seen: Tensor | None,
    drafts: Tensor | None,
    others: Tensor | None,
    pairs: int,
    out: Tensor,
    bad: Tensor | None,
    chunk: int,
) -> Tensor:
    """The best tokens (B, R), the lowest id among equals; checked arguments of `tidar.kernels.sample.sample`."""
    (count, places), vocab = out.shape, logits.shape[-1]
    parts = triton.cdiv(vocab, chunk)
    peaks = torch.empty(count, places, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(count, places, parts, dtype=torch.int32, device=logits.device)
    _peaks[parts, places, count](
        logits, rows, penalty, suppressed, seen, drafts, others, peaks, ids,
        logits.stride(0), logits.stride(-2), 0 if seen is None else seen.stride(0),
        0 if drafts is None else drafts.stride(0), 0 if others is None else others.stride(0),
        PLACES=places - (0 if others is None else others.shape[1]), PAIRS=pairs,
        VOCAB=vocab, CHUNK=chunk, num_warps=4, **options(logits.device),
    )  # fmt: skip
    _best[count * places,](
        peaks,
        ids,
        out,
        bad,
        PARTS=parts,
        PARTS_UP=power_of_2(parts),
        num_warps=1,
        **options(logits.device, when=THEN),
    )
    return out
