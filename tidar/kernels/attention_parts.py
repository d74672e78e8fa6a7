"""How the splits of a prefix meet: each leaves its part of the softmax in memory, and the last to come joins them.

A split's part of a query row is a weighted sum of values, the maximum that the weights are relative to (base 2), and
their sum. Whoever comes last to a tile of query rows reads all parts in the order of the splits, so the result does
not depend on who that was, and there is no second launch.

Memory order: a program stores its part and meets its other threads at a barrier before one of them adds to the tile's
counter. The addition releases what the barrier has gathered and acquires what those before it released, at the scope
of the GPU; the last one's result reaches its other threads through another barrier. So all parts are stored before
anything behind that addition reads them. Parts are read past the L1 cache, which is nobody's but a multiprocessor's.
The last one sets the counter back to 0: nobody else looks at it before the next launch, so a CUDA graph may be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FLOOR", "combine", "last_to_come", "leave"]

FLOOR = tl.constexpr(-1e38)  # a running maximum of nothing: finite, so that no infinity is subtracted from another


@triton.jit
def leave(part, peaks, totals, place, real, acc, peak, total, D: tl.constexpr, WIDTH: tl.constexpr):
    """Store a split's part, rows at ``place``."""
    column = tl.arange(0, WIDTH)
    tl.store(peaks + place, peak, mask=real)
    tl.store(totals + place, total, mask=real)
    inside = real[:, None] & (column < D)[None, :]
    tl.store(part + place.to(tl.int64)[:, None] * D + column[None, :], acc, mask=inside)


@triton.jit
def last_to_come(counter, used):
    """Whether the others of ``used`` splits have left their parts; sets the counter back if so."""
    tl.debug_barrier()  # one thread counts for all
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == used - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def combine(part, peaks, totals, line, step, used, D: tl.constexpr, WIDTH: tl.constexpr, FLIGHT: tl.constexpr):
    """(lines, WIDTH) float32, attention of the rows ``line``; from one split's rows to the next's it is ``step``.

    FLIGHT splits are read at a time, by loads that do not wait for one another.
    """
    column = tl.arange(0, WIDTH)
    inside = (column < D)[None, :]
    spot = line[:, None] * D + column[None, :]
    ROWS: tl.constexpr = line.shape[0]
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    peak, total = tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32)
    for first in range(0, used, FLIGHT):
        new = peak
        for split in tl.static_range(FLIGHT):
            at = first + split
            new = tl.maximum(new, tl.load(peaks + at * step + line, mask=at < used, other=FLOOR, cache_modifier=".cg"))
        shrink = tl.exp2(peak - new)
        acc, total, peak = acc * shrink[:, None], total * shrink, new
        for split in tl.static_range(FLIGHT):
            at = first + split
            theirs = tl.load(peaks + at * step + line, mask=at < used, other=FLOOR, cache_modifier=".cg")
            counted = tl.load(totals + at * step + line, mask=at < used, other=0.0, cache_modifier=".cg")
            rows = tl.load(part + at * step * D + spot, mask=(at < used) & inside, other=0.0, cache_modifier=".cg")
            share = tl.exp2(theirs - peak)
            total += counted * share
            acc += rows * share[:, None]
    return acc / total[:, None]
