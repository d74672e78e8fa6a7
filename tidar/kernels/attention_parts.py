"""How the splits of a step's attention meet: each leaves its part in memory, and the last to come joins them.

A part is what a split knows of its query rows: the weighted sum of values, the maximum that the weights are relative to
(in base 2), and the sum of the weights. The last split to come to a tile of query rows reads the parts of all, in
their own order: the result does not depend on who came last, and it takes no second launch.

Memory order: a program stores its part and meets at a barrier; then one of its threads adds 1 to the tile's counter.
The addition releases, at the scope of the GPU, what the barrier gathered, and acquires what the additions before it
released. It reaches the program's other threads through another barrier. So when all are counted, all parts are stored
before anyone reads them. Parts are read past the L1 cache, which may hold those of the launch before. The last one sets
the counter back to 0, and nobody looks at it before the next launch, so a CUDA graph may be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FLOOR", "combine", "divided", "last_to_come", "leave"]

FLOOR = tl.constexpr(-1e38)  # a running maximum of nothing: finite, so that no infinity is subtracted from another


@triton.jit
def leave(part, peaks, totals, acc, peak, total, HELD: tl.constexpr, D: tl.constexpr):
    """Store the first HELD rows of a split's part."""
    row, column = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    inside = (row < HELD)[:, None] & (column < D)[None, :]
    tl.store(part + row[:, None] * D + column[None, :], acc, mask=inside)
    tl.store(peaks + row, peak, mask=row < HELD)
    tl.store(totals + row, total, mask=row < HELD)


@triton.jit
def last_to_come(counter, used):
    """Whether the others of ``used`` splits have left their parts; if so, the counter is back at 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == used - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def divided(acc, total):
    """The mean of the values; zeros for a query that saw none, as those do that fill a prompt's piece up."""
    return acc / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def combine(
    part, peaks, totals, row, used,
    HELD: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, FLIGHT: tl.constexpr,
):  # fmt: skip
    """(rows, WIDTH) float32: attention of a tile's rows ``row``, from the parts of its splits.

    FLIGHT splits at a time, whose loads do not wait for one another: the time is that of a load rather than of many.
    """
    ROWS: tl.constexpr = row.shape[0]
    column = tl.arange(0, WIDTH)
    spot, inside = row[:, None] * D + column[None, :], (column < D)[None, :]
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    peak, total = tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in tl.static_range(0, SPLITS, FLIGHT):
        new, theirs = peak, ()
        for split in tl.static_range(first, min(first + FLIGHT, SPLITS)):
            one = tl.load(peaks + split * HELD + row, mask=split < used, other=FLOOR, cache_modifier=".cg")
            new = tl.maximum(new, one)
            theirs = theirs + (one,)  # type: ignore[assignment]
        shrink = tl.exp2(peak - new)
        acc, total, peak = acc * shrink[:, None], total * shrink, new
        for split in tl.static_range(first, min(first + FLIGHT, SPLITS)):
            share = tl.exp2(theirs[split - first] - peak)
            there = split < used
            rows = tl.load(part + split * HELD * D + spot, mask=inside & there, other=0.0, cache_modifier=".cg")
            total += share * tl.load(totals + split * HELD + row, mask=there, other=0.0, cache_modifier=".cg")
            acc += share[:, None] * rows
    return divided(acc, total)
