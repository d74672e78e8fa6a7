"""The kernel of `tidar.kernels.products`: a tile of a matrix product with what stands before and behind it.

A norm is divided between two products: the one before it knows the rows' numbers and leaves them times the norm's
weight, with each tile's sums of squares; the one behind it multiplies those and divides by the root of the sums' mean.

Three ways to the sums, by the rows of a tile (`tidar.kernels.product_tiles`): a single one is multiplied and summed
without tensor cores; up to 32 are too few for Hopper's own matrix instructions, so the warps share the depth; from 64
on those instructions read both tiles from shared memory.

A weight of one byte a number (`tidar.kernels.quantised`) is widened in registers and the sums are scaled. From 64 rows
on its product is turned round, w · xᵀ: only the left side of Hopper's instructions may come from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidar.kernels.attention_parts import last_to_come
from tidar.kernels.pdl import begin, prefetch, release

__all__ = ["product"]


@triton.jit
def _accumulate(acc, x, w, SLICES: tl.constexpr, TURNED: tl.constexpr):
    """Take x (rows, depth) and w (columns, depth) into the sums."""
    ROWS: tl.constexpr = x.shape[0]
    PIECE: tl.constexpr = x.shape[1] // SLICES
    if ROWS == 1:
        acc += w.to(tl.float32) * x.to(tl.float32)  # (columns, depth), summed at the end
    elif TURNED:
        acc = tl.dot(w.to(x.dtype), tl.trans(x), acc, input_precision="ieee")  # (columns, rows)
    elif SLICES == 1:
        # Triton's default for float32 is tf32: too coarse to decode exactly.
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
    else:
        # Warps share the depth: each multiplies a slice of its own, so none reads the weight of another.
        x = tl.permute(tl.reshape(x, (ROWS, SLICES, PIECE)), (1, 0, 2))
        w = tl.permute(tl.reshape(w.to(x.dtype), (w.shape[0], SLICES, PIECE)), (1, 2, 0))
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _sums(ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr, TURNED: tl.constexpr):
    if ROWS == 1:
        return tl.zeros((COLS, DEPTH), tl.float32)
    elif TURNED:
        return tl.zeros((COLS, ROWS), tl.float32)
    elif SLICES == 1:
        return tl.zeros((ROWS, COLS), tl.float32)
    else:
        return tl.zeros((SLICES, ROWS, COLS), tl.float32)


@triton.jit
def _total(acc, ROWS: tl.constexpr, SLICES: tl.constexpr, TURNED: tl.constexpr):
    """(rows, columns) from what `_accumulate` keeps."""
    if ROWS == 1:
        return tl.sum(acc, 1)[None, :]
    elif TURNED:
        return tl.trans(acc)
    elif SLICES == 1:
        return acc
    else:
        return tl.sum(acc, 0)


# One program for all numbers of rows: compiled anew for some (1, multiples of 16), loads would be laid out otherwise,
# and sums over them formed in another order.
@triton.jit(do_not_specialize=["count", "squares_row"])
def product(
    x, rows, into, squares, weighed, weight, scale, bias, out, norm, scaled, squared, weighed_squared, part, arrived,
    count, eps, again, x_row, squares_row, out_row,
    D: tl.constexpr, F: tl.constexpr, GATES: tl.constexpr, ADD: tl.constexpr, CHUNKS: tl.constexpr, HELD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr,
    BEHIND: tl.constexpr, SPLITS: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of rows and columns. Row tiles of the same columns run side by side, so a weight is read once.

    With ``TMA``, x and weight are descriptors of (N, D) and of (F, 1 or 2 if there are gates, D). ``squares`` are
    CHUNKS sums for each row of x, HELD the power of 2 that holds them; ``scaled`` and ``squared`` are left for the
    product behind. ``scale`` is a quantised weight's. ``rows`` are taken from x, ``into`` are those of the result.
    Columns from BEHIND on are of what the norm makes of x normed again, without weights, by the epsilon ``again``;
    ``weighed`` are the sums of squares of what this norm is of, and ``weighed_squared`` are left of them.
    """
    HALVES: tl.constexpr = 2 if GATES else 1
    TAKEN: tl.constexpr = COLS // HALVES
    TURNED: tl.constexpr = scale is not None and ROWS >= 64
    first, top = tl.program_id(1) * TAKEN, tl.program_id(0) * ROWS
    col, k = tl.arange(0, COLS), tl.arange(0, DEPTH)[None, :]
    # A gate and its up are neighbours, to meet in a thread. Behind the last it is read again: no mask in the loop.
    w_row = tl.minimum(first + col // HALVES, F - 1) + col % HALVES * F
    if not TMA:
        w_at = weight + w_row.to(tl.int64)[:, None] * D
    if PDL and AHEAD > 0 and not TMA:
        LINE: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
        prefetch(w_at + tl.minimum(tl.arange(0, AHEAD // LINE) * LINE, D - 1)[None, :])
    begin(PDL)

    line = tl.arange(0, ROWS)
    at = top + line
    real, chosen = at < count, at
    if rows is not None:
        chosen = tl.load(rows + at, mask=real, other=0)
    if not TMA:
        w_at += k
        x_at = x + chosen.to(tl.int64)[:, None] * x_row + k
    if squares is not None:
        chunk = tl.arange(0, HELD)
        sums = squares + chunk[:, None] * squares_row + chosen[None, :]
        sums = tl.load(sums, mask=(chunk < CHUNKS)[:, None] & real[None, :], other=0.0)
        inverse = tl.rsqrt(tl.sum(sums, 0) / D + eps)
    if weighed is not None:
        sums = weighed + chunk[:, None] * squares_row + chosen[None, :]
        sums = tl.load(sums, mask=(chunk < CHUNKS)[:, None] & real[None, :], other=0.0)
        twice = tl.rsqrt(tl.sum(sums, 0) / D + again / (inverse * inverse))
        if BEHIND % TAKEN == 0:  # one number a row is enough, and its registers
            inverse = tl.where(first >= BEHIND, twice, inverse)
    start, end = 0, D
    if SPLITS > 1:
        SHARE: tl.constexpr = (D // DEPTH + SPLITS - 1) // SPLITS * DEPTH
        start = tl.program_id(2) * SHARE
        end = tl.minimum(start + SHARE, D)
    acc = _sums(ROWS, COLS, DEPTH, SLICES, TURNED)

    for d in tl.range(start, end, DEPTH, num_stages=STAGES):
        if TMA:
            taken = x.load([top, d])
            w = tl.reshape(weight.load([first, 0, d]), (COLS, DEPTH))
        else:
            taken = tl.load(x_at + d, mask=real[:, None], other=0.0)
            w = tl.load(w_at + d)
        acc = _accumulate(acc, taken, w, SLICES, TURNED)

    release(PDL)
    acc = _total(acc, ROWS, SLICES, TURNED)
    if SPLITS > 1:
        # The last to come adds the shares up, in their order: the sum does not depend on who that is.
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        shares = part + tile.to(tl.int64) * (SPLITS * ROWS * COLS) + line[:, None] * COLS + col[None, :]
        tl.store(shares + tl.program_id(2) * (ROWS * COLS), acc)
        if not last_to_come(arrived + tile, SPLITS):
            return
        acc = tl.load(shares, cache_modifier=".cg")
        for split in range(1, SPLITS):
            acc += tl.load(shares + split * (ROWS * COLS), cache_modifier=".cg")
    if scale is not None:
        acc *= tl.load(scale + w_row)[None, :]
    if weighed is not None and BEHIND % TAKEN != 0:
        acc *= tl.where((w_row >= BEHIND)[None, :], twice[:, None], inverse[:, None])
    elif squares is not None:
        acc *= inverse[:, None]
    if bias is not None:
        acc += tl.load(bias + w_row).to(tl.float32)[None, :]
    if GATES:
        gate, up = tl.split(tl.reshape(acc, (ROWS, TAKEN, 2)))
        acc = gate * tl.sigmoid(gate) * up
    column = first + tl.arange(0, TAKEN)
    given = at
    if into is not None:
        given = tl.load(into + at, mask=real, other=0)
    place = out + given.to(tl.int64)[:, None] * out_row + column[None, :]
    inside = real[:, None] & (column < F)[None, :]
    if ADD:
        acc += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    narrow = acc.to(out.dtype.element_ty)
    tl.store(place, narrow, mask=inside)
    if norm is not None:
        wide = tl.where(inside, narrow.to(tl.float32), 0.0)  # as it was rounded: all see one residual stream
        heavy = wide * tl.load(norm + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
        heavy = heavy.to(scaled.dtype.element_ty)
        tl.store(scaled + at.to(tl.int64)[:, None] * F + column[None, :], heavy, mask=inside)
        mine = tl.program_id(1) * count + at
        tl.store(squared + mine, tl.sum(wide * wide, 1), mask=real)
        if weighed_squared is not None:
            wide = heavy.to(tl.float32)  # as it was rounded, too
            tl.store(weighed_squared + mine, tl.sum(wide * wide, 1), mask=real)
