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

__all__ = ["greedy", "logits_of", "place_of"]


@triton.jit
def logits_of(given, ids, VOCAB: tl.constexpr):
    """Logits of a chunk after suppression and penalty; -inf behind the vocabulary."""
    row, suppressed, seen, drafts, count, penalty = given
    inside = ids < VOCAB
    x = tl.load(row + ids, mask=inside, other=-float("inf"))
    if suppressed is not None:
        x = tl.where(tl.load(suppressed + ids, mask=inside, other=0) != 0, -float("inf"), x)
    if seen is not None:
        known = tl.load(seen + ids, mask=inside, other=0) != 0
        if drafts is not None:
            for j in range(count):
                known |= ids == tl.load(drafts + j)
        x = tl.where(known, tl.where(x < 0, x * penalty, tl.div_rn(x, penalty)), x)
    return x


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
    logits, penalties, suppressed, seen, drafts, places, peaks, ids, logits_step, row_step, seen_step, drafts_step,
    places_step, PLACES: tl.constexpr, PAIRS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
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
    given = (logits + b * logits_step + r.to(tl.int64) * row_step, suppressed, seen, drafts, count, penalty)
    token = part * CHUNK + tl.arange(0, CHUNK)
    x = logits_of(given, token, VOCAB)
    x = tl.where(x == x, x, float("inf"))  # a NaN must not be overlooked
    peak = tl.max(x)
    at = (b * tl.num_programs(1) + r) * tl.num_programs(0) + part
    tl.store(peaks + at, peak)
    tl.store(ids + at, tl.min(tl.where(x == peak, token, VOCAB)))


@triton.jit
def _best(peaks, ids, out, bad, PARTS: tl.constexpr, PARTS_UP: tl.constexpr, PDL: tl.constexpr) -> None:
    begin(PDL)
    row, part = tl.program_id(0), tl.arange(0, PARTS_UP)
    peak = tl.load(peaks + row * PARTS + part, mask=part < PARTS, other=-float("inf"))
    token = tl.load(ids + row * PARTS + part, mask=part < PARTS, other=2**31 - 1)
    highest = tl.max(peak)
    fine = tl.abs(highest) < float("inf")
    found = tl.min(tl.where(peak == highest, token, 2**31 - 1))
    tl.store(out + row, tl.where(fine, found, 0).to(tl.int64))
    if bad is not None:
        tl.store(bad, 1, mask=~fine)


def greedy(
    logits: Tensor,
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
    rows, places, vocab = logits.shape
    parts = triton.cdiv(vocab, chunk)
    peaks = torch.empty(rows, places, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, places, parts, dtype=torch.int32, device=logits.device)
    _peaks[parts, places, rows](
        logits, penalty, suppressed, seen, drafts, others, peaks, ids,
        *logits.stride()[:2], 0 if seen is None else seen.stride(0), 0 if drafts is None else drafts.stride(0),
        0 if others is None else others.stride(0), PLACES=places - (0 if others is None else others.shape[1]),
        PAIRS=pairs, VOCAB=vocab, CHUNK=chunk, num_warps=4, **options(logits.device),
    )  # fmt: skip
    _best[rows * places,](
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
