"""Attention of a decoding step in one pass over the prefix, as Triton kernels.

All queries of a step see the same prefix, drafts and masks alike; only the keys that the step itself brings are seen
by some and not by others. So the G query heads of a key head and the L queries are folded into one axis of L·G query
rows, cut into tiles; a tile walks over the prefix without any mask, then over the few own keys that its queries may
see: the causal tokens and the blocks of masks that lie in the tile. Which query sees which of them is index arithmetic.

The softmax is computed online, with the sum divided out at the end (FlashAttention-2, Dao 2023). A step has few
query rows for a large GPU, so the prefix is split among programs and the parts are combined afterwards (Flash-Decoding,
Dao et al. 2023).

Lengths, levels and page tables are read on the device only: grid and shapes depend on static sizes, so a step can be
captured in a CUDA graph. `tidar.kernels.reference` is the plain twin.

Legend: B rows, L queries, C causal ones, P blocks of M masks, Hq = G·Hk query heads, Hk key heads, D head width.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.reference import check_step
from tidar.kernels.workspace import Workspace, own_keys, power_of_2

__all__ = ["attend"]

LOG2E = tl.constexpr(math.log2(math.e))
COMBINED = 16  # query rows a program of _combine
FLOOR = tl.constexpr(-1e38)  # a running maximum of nothing: finite, so that no infinity is subtracted from another


@triton.jit
def _rows(ptr, at, D: tl.constexpr, WIDTH: tl.constexpr, real=None):
    """Rows of D numbers at offsets ``at``, padded to WIDTH; zeros where not ``real``, whatever memory holds there."""
    column = tl.arange(0, WIDTH)
    place, inside = ptr + at[:, None] + column[None, :], (column < D)[None, :]
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
def _span(length, WINDOW: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr):
    """The prefix's first tile that a step sees, one past its last, and the tiles that a split takes."""
    end = tl.cdiv(length, KEYS)
    first = 0
    if WINDOW:
        first = tl.maximum(length - WINDOW + 1, 0) // KEYS
    return first, end, tl.cdiv(end - first, SPLITS)


@triton.jit
def _slots(table, key, length, page_step, slot_step, PAGE: tl.constexpr):
    """Where in the pages the keys of a prefix are; page 0 for keys behind it."""
    page = tl.load(table + key // PAGE, mask=key < length, other=0).to(tl.int64)
    return page * page_step + key % PAGE * slot_step


@triton.jit
def _attend(
    q, k, v, k_pages, v_pages, table, lengths, levels, sinks,
    out, part, peaks, totals, inner, factor,
    q_row, q_query, q_head, k_row, k_query, k_head, v_row, v_query, v_head,
    page_step, slot_step, head_step, table_step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of query rows over a split of the prefix, and in the last split over the step's own keys too."""
    tile, pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    length = tl.load(lengths + row)
    first, end, share = _span(length, WINDOW, KEYS, SPLITS)
    lo = first + split * share
    hi = tl.minimum(lo + share, end)
    if (lo >= hi) & (split < SPLITS - 1):
        return  # _combine knows which splits had work

    # L·G query rows, a query's G heads together. A tile is filled up with copies of the last row, never stored.
    lines = tile * ROWS + tl.arange(0, ROWS)
    line = tl.minimum(lines, QUERIES * GROUP - 1)
    query, query_head = line // GROUP, head * GROUP + line % GROUP
    # What a query sees of its step: causal tokens before `stop`, masks from `mates` on. `place`: position - length.
    place, stop = query, query + 1
    if BLOCK:
        mask = query - CAUSAL
        level = tl.load(levels + mask // BLOCK, mask=mask >= 0, other=0).to(tl.int32)
        place = tl.where(mask >= 0, level + mask % BLOCK, place)
        stop = tl.where(mask >= 0, level, stop)
        mates = tl.where(mask >= 0, CAUSAL + mask // BLOCK * BLOCK, QUERIES)

    queries = _rows(q, row * q_row + query * q_query + query_head * q_head, D, WIDTH)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    peak, total = tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32)
    if sinks is not None and split == SPLITS - 1:
        # A sink is a key with a value of zero; one split alone may count it.
        peak = tl.load(sinks + query_head).to(tl.float32) * LOG2E
        total += 1.0

    # Prefix. Without a window all queries see all of it, so only its last tile needs a mask.
    pages = table + row * table_step
    whole = lo if WINDOW else tl.maximum(tl.minimum(hi, length // KEYS), lo)
    # Page numbers are fetched a tile ahead by hand: loads that wait for loads would halve the compiler's pipeline.
    ahead = _slots(pages, lo * KEYS + tl.arange(0, KEYS), length, page_step, slot_step, PAGE)
    for at in range(lo, whole):
        slots = ahead + head * head_step
        ahead = _slots(pages, (at + 1) * KEYS + tl.arange(0, KEYS), length, page_step, slot_step, PAGE)
        score = _scores(queries, _rows(k_pages, slots, D, WIDTH), inner, SOFTCAP)
        values = _rows(v_pages, slots, D, WIDTH)
        acc, peak, total = _update(score, values, acc, peak, total, factor)
    for at in range(whole, hi):
        key = at * KEYS + tl.arange(0, KEYS)
        # Slots behind the prefix may hold anything, NaN too: they must not even be multiplied by zero.
        there = key < length
        slots = ahead + head * head_step
        ahead = _slots(pages, key + KEYS, length, page_step, slot_step, PAGE)
        score = _scores(queries, _rows(k_pages, slots, D, WIDTH, there), inner, SOFTCAP)
        values = _rows(v_pages, slots, D, WIDTH, there)
        seen = there[None, :]
        if WINDOW:
            seen = seen & (key[None, :] > (length + place - WINDOW)[:, None])
        acc, peak, total = _update(tl.where(seen, score, -float("inf")), values, acc, peak, total, factor)

    # Own keys: the causal tokens, then the blocks of masks that have a query in this tile; no other can be seen.
    last = (tl.minimum(tile * ROWS + ROWS, QUERIES * GROUP) - 1) // GROUP
    clean = tl.minimum(last + 1, CAUSAL)
    skipped, count = 0, clean
    if BLOCK:
        begin = tl.maximum(tile * ROWS // GROUP - CAUSAL, 0) // BLOCK * BLOCK
        skipped = CAUSAL + begin - clean
        count = clean + tl.maximum(last - CAUSAL + BLOCK, 0) // BLOCK * BLOCK - begin
    count = tl.where(split == SPLITS - 1, count, 0)  # for the split whose share of the prefix rounding makes short
    for at in tl.range(0, count, OWN, num_stages=1):
        index = at + tl.arange(0, OWN)
        key = tl.where(index < clean, index, index + skipped)
        here = index < count
        new_k = _rows(k, row * k_row + key * k_query + head * k_head, D, WIDTH, here)
        new_v = _rows(v, row * v_row + key * v_query + head * v_head, D, WIDTH, here)
        text = key[None, :] < stop[:, None]
        seen = text
        if BLOCK:
            mate = key[None, :] - mates[:, None]
            seen = text | ((mate >= 0) & (mate < BLOCK))
        if WINDOW:
            away = tl.where(text, place[:, None] - key[None, :], query[:, None] - key[None, :])
            seen = seen & (away < WINDOW)
        score = tl.where(seen & here[None, :], _scores(queries, new_k, inner, SOFTCAP), -float("inf"))
        acc, peak, total = _update(score, new_v, acc, peak, total, factor)

    column, real = tl.arange(0, WIDTH), lines < QUERIES * GROUP
    if SPLITS == 1:
        base = ((row * QUERIES + query) * HEADS * GROUP + query_head) * D
        place_RD, result = out + base[:, None] + column[None, :], (acc / total[:, None]).to(out.dtype.element_ty)
    else:
        base = (split * tl.num_programs(1) + pair).to(tl.int64) * QUERIES * GROUP + line
        place_RD, result = part + base[:, None] * D + column[None, :], acc
        tl.store(peaks + base, peak, mask=real)
        tl.store(totals + base, total, mask=real)
    tl.store(place_RD, result, mask=real[:, None] & (column < D)[None, :])


@triton.jit
def _combine(
    lengths, out, part, peaks, totals,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    tile, pair = tl.program_id(0), tl.program_id(1)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    first, end, share = _span(tl.load(lengths + row), WINDOW, KEYS, SPLITS)
    # Splits that found work, from the first on; and the last, which always has the own keys.
    used = tl.minimum(tl.cdiv(end - first, tl.maximum(share, 1)) + 1, SPLITS)
    lines, column = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    line = tl.minimum(lines, QUERIES * GROUP - 1)  # as in _attend
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    peak, total = tl.full((ROWS,), FLOOR, tl.float32), tl.zeros((ROWS,), tl.float32)
    for at in range(used):
        split = tl.where(at == used - 1, SPLITS - 1, at)
        base = (split * tl.num_programs(1) + pair).to(tl.int64) * QUERIES * GROUP + line
        theirs = tl.load(peaks + base)
        new = tl.maximum(peak, theirs)
        old_share, new_share = tl.exp2(peak - new), tl.exp2(theirs - new)
        total = total * old_share + tl.load(totals + base) * new_share
        acc *= old_share[:, None]
        acc += _rows(part, base * D, D, WIDTH) * new_share[:, None]
        peak = new
    base = ((row * QUERIES + line // GROUP) * HEADS * GROUP + head * GROUP + line % GROUP) * D
    inside = (lines < QUERIES * GROUP)[:, None] & (column < D)[None, :]
    tl.store(out + base[:, None] + column[None, :], (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    levels: Tensor,
    *,
    causal: int,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attention of one layer in one decoding step (paper, section 3.2 and Figure 3).

    Query i < C is a causal token at position ``lengths[b] + i`` and sees the prefix and causal tokens 0 … i. Mask m of
    block p is at position ``lengths[b] + levels[p] + m`` and sees the prefix, the first ``levels[p]`` causal tokens and
    all masks of its block.

    Args:
        q: (B, L, Hq, D) float32, float16 or bfloat16, rotary embedding applied, as all of the next four.
        k_new: (B, L, Hk, D), the step's own keys; they need not be in the pages.
        v_new: (B, L, Hk, D).
        k_pages: (pages, page_size, Hk, D), the committed prefixes.
        v_pages: the same.
        block_table: (B, n) int32, the pages of each row in order; entries behind its prefix are not read.
        lengths: (B,) int32, committed tokens of each row, at most ``n · page_size``.
        levels: (P,) integers in 0 … C, the causal tokens that each block of masks sees. Not checked: they stay on
            the device.
        causal: C; the other L - C queries are P equal blocks.
        scale: factor on the scores; 1/sqrt(D) by default.
        window: a query sees keys at positions ``> position - window`` only.
        softcap: scores become ``softcap · tanh(scores / softcap)``.
        sinks: (Hq,), one extra logit a head.
        out: (B, L, Hq, D) contiguous, where to write.
        workspace: made for these sizes. Made anew without; give one, and ``out``, where nothing may be allocated.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_step(q, k_new, v_new, k_pages, v_pages, block_table, lengths, levels, causal, scale, window, softcap, sinks)
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TidarError(f"the kernel has no {q.dtype}: use tidar.kernels.reference")
    rows, length, query_heads, width = q.shape
    heads, page, blocks = k_new.shape[2], k_pages.shape[1], levels.shape[0]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise TidarError(f"out must be contiguous, {tuple(q.shape)} and {q.dtype}")
    if workspace is None:
        workspace = Workspace.for_step(
            rows, length, query_heads, heads, width, block_table.shape[1] * page, dtype=q.dtype, device=q.device
        )
    if workspace.shape != (rows, length, query_heads, heads, width) or workspace.part.device != q.device:
        raise TidarError(
            f"the workspace was made for {workspace.shape} on {workspace.part.device}: make one for this step"
        )
    chosen = workspace.tiles
    group, block = query_heads // heads, (length - causal) // blocks if blocks else 0
    inner = (width**-0.5 if scale is None else scale) / (softcap or 1)
    factor = LOG2E.value * (softcap or inner)
    shared = {"HEADS": heads, "GROUP": group, "QUERIES": length, "D": width, "WIDTH": max(16, power_of_2(width))}
    shared |= {"WINDOW": window or 0, "KEYS": chosen.keys, "SPLITS": chosen.splits}
    grid = (triton.cdiv(length * group, chosen.rows), rows * heads, chosen.splits)
    _attend[grid](
        q, k_new, v_new, k_pages, v_pages, block_table, lengths, levels, sinks,
        out, workspace.part, workspace.peaks, workspace.totals, inner, factor,
        *q.stride()[:3], *k_new.stride()[:3], *v_new.stride()[:3], *k_pages.stride()[:3], block_table.stride(0),
        CAUSAL=causal, BLOCK=block, PAGE=page, SOFTCAP=softcap is not None, ROWS=chosen.rows,
        OWN=own_keys(chosen, causal, block, blocks, group),
        num_warps=chosen.warps, num_stages=chosen.stages, **shared,
    )  # fmt: skip
    if chosen.splits > 1:
        _combine[triton.cdiv(length * group, COMBINED), rows * heads](
            lengths, out, workspace.part, workspace.peaks, workspace.totals, ROWS=COMBINED, num_warps=4, **shared
        )
    return out
