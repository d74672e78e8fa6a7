"""Drafts that lean on nothing but their masks, their chances, and what came next, as two Triton kernels.

What the drafts are is what `tidar.kernels.sample` makes of the masks' logits. How probable each of them was
(`tidar.proposals.chance`) takes the sum over its whole row. So many programs share a row: each leaves its chunk's best
token, the sum's logarithm, and what may be among the next best, and a program of the second kernel makes a draft of
that. Where drafts are sampled, the sampler's own kernel comes before them.

Legend: B rows, R drafts, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.attention_parts import FLOOR
from tidar.kernels.greedy import best_of, penalised, plain_of, row_of
from tidar.kernels.params import DeviceParams
from tidar.kernels.pdl import begin, options
from tidar.kernels.reference_chain import check_results, check_runners
from tidar.kernels.reference_step import Runners
from tidar.kernels.sample import CHUNK, check, chunk_of, sample
from tidar.kernels.workspace import power_of_2
from tidar.proposals import KNOWN, RUNNERS_UP

__all__ = ["draft"]

LAST = tl.constexpr(2**31 - 1)  # above all tokens


@triton.jit
def chunks(
    logits, rows, penalties, suppressed, seen, masses, peaks, ids, tops, names, logits_step, row_step, seen_step,
    TOPS: tl.constexpr, VOCAB: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A chunk of a row: the logarithm of its mass; the token that is chosen unless another chunk has a better one; and
    the best tokens, in their order, without a penalty."""
    begin(PDL)
    part, r, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = row_of(logits, rows, r, b, logits_step, row_step, tl.num_programs(1))
    token = part * CHUNK + tl.arange(0, CHUNK)
    plain = plain_of(row, suppressed, token, VOCAB)
    x = plain
    if seen is not None:
        x = penalised(x, seen + b * seen_step, None, 0, tl.load(penalties + b), token, VOCAB)
    # A NaN must not be overlooked.
    plain, x = tl.where(plain == plain, plain, float("inf")), tl.where(x == x, x, float("inf"))
    at = (b * tl.num_programs(1) + r) * tl.num_programs(0) + part
    peak = tl.minimum(tl.maximum(tl.max(plain), FLOOR), -FLOOR)  # infinities from one another are NaN
    mass = tl.maximum(tl.sum(tl.exp(plain - peak)), 1.0)  # of a chunk without a token 1, of next to nothing
    tl.store(masses + at, peak + tl.log(mass))
    if peaks is not None:
        peak, first = best_of(x, token, VOCAB)
        tl.store(peaks + at, peak)
        tl.store(ids + at, first)
    for top in tl.static_range(TOPS):
        peak, first = best_of(plain, token, VOCAB)
        tl.store(tops + at * TOPS + top, peak)
        tl.store(names + at * TOPS + top, first)
        plain = tl.where(token == first, -float("inf"), plain)


@triton.jit
def conclude(
    logits, rows, suppressed, sampled, masses, peaks, ids, tops, names, made, given, out, chances, runners, followers,
    bad, logits_step, row_step, out_step, chance_step,
    PARTS: tl.constexpr, PARTS_UP: tl.constexpr, TOPS: tl.constexpr, TOPS_UP: tl.constexpr, BEST: tl.constexpr,
    KNOWN: tl.constexpr, VOCAB: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A draft, of all chunks of its row."""
    begin(PDL)
    r, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at, part = b * tl.num_programs(0) + r, tl.arange(0, PARTS_UP)
    mass = tl.load(masses + at * PARTS + part, mask=part < PARTS, other=-float("inf"))
    kept, known = tl.load(made + at) != 0, 0
    if given is not None:
        known = tl.load(given + b)
    if sampled is not None:
        token = tl.load(sampled + at)
    else:
        peak = tl.load(peaks + at * PARTS + part, mask=part < PARTS, other=-float("inf"))
        token = tl.load(ids + at * PARTS + part, mask=part < PARTS, other=LAST)
        highest, token = best_of(peak, token, LAST)
        fine = tl.abs(highest) < float("inf")
        token = tl.where(fine, token, 0).to(tl.int64)
        if bad is not None:
            tl.store(bad, 1, mask=~fine)

    row = row_of(logits, rows, r, b, logits_step, row_step, tl.num_programs(0))
    logit = tl.minimum(plain_of(row, suppressed, token, VOCAB), -FLOOR)
    top = tl.minimum(tl.max(mass), -FLOOR)
    chance = tl.exp(logit - top - tl.log(tl.sum(tl.exp(mass - top))))
    chance = tl.where(kept & (chance == chance), chance, 0.0)
    tl.store(chances + b * chance_step + r, tl.where(r < known, KNOWN, chance))
    out += b * out_step + r
    token = tl.where(kept, token, 0)
    if given is not None:
        token = tl.where(r < known, tl.load(out), token)
    tl.store(out, token)

    if runners is not None:
        slot, best = tl.arange(0, TOPS_UP), tl.arange(0, BEST)
        score = tl.load(tops + at * PARTS * TOPS + slot, mask=slot < PARTS * TOPS, other=-float("inf"))
        name = tl.load(names + at * PARTS * TOPS + slot, mask=slot < PARTS * TOPS, other=0)
        score = tl.where(name == token, -float("inf"), score)
        found = tl.zeros((BEST,), tl.int32)
        for rank in tl.static_range(BEST):
            _, first = best_of(score, name, LAST)
            found = tl.where(best == rank, first, found)
            score = tl.where(name == first, -float("inf"), score)
        tl.store(runners + at * BEST + best, found.to(tl.int64))
        # The next draft leans on none of them, so that it follows them all.
        tl.store(followers + (at - 1) * BEST + best, token + tl.zeros((BEST,), tl.int64), mask=r > 0)


def draft(
    logits: Tensor,
    params: DeviceParams,
    lengths: Tensor,
    made: Tensor,
    *,
    first: int,
    suppressed: Tensor | None = None,
    seen: Tensor | None = None,
    sampling: bool,
    filtering: bool,
    bad: Tensor | None = None,
    rows: Tensor | None = None,
    given: Tensor | None = None,
    out: Tensor,
    chances: Tensor,
    runners: Runners | None = None,
) -> None:
    """Drafts d_1 … d_R, each of its mask's logits alone: the tokens of `tidar.kernels.sample.sample`.

    Args:
        logits, params, lengths, first, suppressed, seen, sampling, filtering, bad, rows: as of ``sample``.
        made: (B, R) bool contiguous. A draft that nobody made is token 0.
        given: (B,) int32 in 0 … R: as many drafts are known, and stand in ``out``.
        out: (B, R) int64, contiguous in a row, where to write.
        chances: (B, R) float32, contiguous in a row: gets the probability of each draft (`tidar.proposals.chance`),
            without what is suppressed; 0 of one that nobody made or whose logits are ``bad``, `tidar.proposals.KNOWN`
            of one that was given.
        runners: gets the tokens that came next after each draft, made or not, by their logits, as `chances` are, the
            lower ones first among equals; and as what follows them the next draft.

    Raises:
        TidarError: arguments that do not fit together.
    """
    count, places, vocab = check(logits, params, lengths, suppressed, seen, bad, rows)
    if made.shape != (count, places) or made.dtype != torch.bool or not made.is_contiguous():
        raise TidarError(f"made must be {(count, places)} bool and contiguous, not {tuple(made.shape)} {made.dtype}")
    check_results(made, given, out, chances)
    check_runners(made, runners)
    if out.stride(1) != 1 or chances.stride(1) != 1:
        raise TidarError("drafts and chances must be contiguous in a row")
    sampled = None
    if sampling:
        sampled = sample(
            logits,
            params,
            lengths,
            first=first,
            suppressed=suppressed,
            seen=seen,
            sampling=True,
            filtering=filtering,
            bad=bad,
            rows=rows,
        )
    masked, known = (None if t is None else t.view(torch.uint8) for t in (suppressed, seen))
    chunk = min(chunk_of(vocab), CHUNK)
    parts, tops = triton.cdiv(vocab, chunk), 0 if runners is None else RUNNERS_UP + 1  # the draft may be one of them

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, places, parts, *shape, dtype=dtype, device=logits.device)

    masses, peaks, ids = room(), None, None
    if sampled is None:
        peaks, ids = room(), room(dtype=torch.int32)
    best, names = (room(tops), room(tops, dtype=torch.int32)) if tops else (None, None)
    steps, stream = (logits.stride(0), logits.stride(-2)), options(logits.device)
    penalty = None if sampled is not None else known
    chunks[parts, places, count](
        logits, rows, params.penalty, masked, penalty, masses, peaks, ids, best, names, *steps,
        0 if penalty is None else penalty.stride(0), TOPS=tops, VOCAB=vocab, CHUNK=chunk, num_warps=4, **stream,
    )  # fmt: skip
    conclude[places, count](
        logits, rows, masked, sampled, masses, peaks, ids, best, names, made, given, out, chances,
        *((None, None) if runners is None else (runners.tokens, runners.followers)), bad, *steps, out.stride(0),
        chances.stride(0), PARTS=parts, PARTS_UP=power_of_2(parts), TOPS=tops, TOPS_UP=power_of_2(max(1, parts * tops)),
        BEST=RUNNERS_UP, KNOWN=KNOWN, VOCAB=vocab, num_warps=1, **stream,
    )  # fmt: skip
