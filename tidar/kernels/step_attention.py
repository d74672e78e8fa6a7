"""Attention of a decoding step in one launch and one pass over the prefix, as a Triton kernel.

All queries of a step see the same prefix, drafts and masks alike; only the keys that the step itself brings are seen
by some and not by others. So the G query heads of a key head and the L queries are folded into one axis of L·G query
rows, cut into tiles; a tile walks over the prefix, then over the few own keys that its queries may see: the causal
tokens and the blocks of masks that lie in the tile. Which query sees which of them is index arithmetic.

The softmax is computed online, with the sum divided out at the end (FlashAttention-2, Dao 2023). A step has few
query rows for a large GPU, so a tile's keys are split among programs (Flash-Decoding, Dao et al. 2023), and the last of
them joins the parts (`tidar.kernels.attention_parts`).

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
from tidar.kernels.attention_parts import FLOOR, combine, last_to_come, leave
from tidar.kernels.pdl import begin, options
from tidar.kernels.reference import check_step
from tidar.kernels.workspace import Workspace, joining, own_keys, power_of_2

__all__ = ["attend"]

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _rows(place, D: tl.constexpr, WIDTH: tl.constexpr, real=None):
    """Rows of D numbers at pointers ``place``, padded to WIDTH; zeros where not ``real``, whatever memory holds."""
    column = tl.arange(0, WIDTH)
    place, inside = place[:, None] + column[None, :], (column < D)[None, :]
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
def _attend(
    q, k, v, k_pages, v_pages, table, lengths, levels, sinks,
    out, part, peaks, totals, arrived, inner, factor, table_step, table_width,
    Q_STEPS: tl.constexpr, K_STEPS: tl.constexpr, V_STEPS: tl.constexpr, PAGE_STEPS: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr,
    HELD: tl.constexpr, FEW: tl.constexpr, FLIGHT: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of query rows over a split of its keys; the last split to come to a tile joins their parts."""
    begin(PDL)
    tile, pair, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = (pair // HEADS).to(tl.int64), pair % HEADS
    length = tl.load(lengths + row)

    # Own keys: the causal tokens, then the blocks of masks that have a query in this tile; no other can be seen.
    last = (tl.minimum(tile * ROWS + ROWS, QUERIES * GROUP) - 1) // GROUP
    clean = tl.minimum(last + 1, CAUSAL)
    skipped, count = 0, clean
    if BLOCK:
        from_mask = tl.maximum(tile * ROWS // GROUP - CAUSAL, 0) // BLOCK * BLOCK
        skipped = CAUSAL + from_mask - clean
        count = clean + tl.maximum(last - CAUSAL + BLOCK, 0) // BLOCK * BLOCK - from_mask

    # Tiles of own keys, then of the prefix, are dealt to the splits in turn. Which of the prefix comes first to a split
    # does not depend on the length (without a window), so its page can be asked for before the length is known.
    own, first = tl.cdiv(count, OWN), 0
    if WINDOW:
        first = tl.maximum(length - WINDOW + 1, 0) // KEYS
    start, end = first + split - own + tl.cdiv(tl.maximum(own - split, 0), SPLITS) * SPLITS, tl.cdiv(length, KEYS)
    pages = table + row * table_step
    ahead = _pages(pages, start, length, table_width, PAGE, KEYS)
    used = tl.minimum(own + end - first, SPLITS)
    if split >= used:
        return

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

    queries = _rows(q + row * Q_STEPS[0] + (query * Q_STEPS[1] + query_head * Q_STEPS[2]), D, WIDTH)
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
        ahead = _pages(pages, at + SPLITS, length, table_width, PAGE, KEYS)
        # Slots behind the prefix may hold anything, NaN too: they must not even be multiplied by zero.
        there = at * KEYS + offset < length
        score = _scores(queries, _rows(k_pages + place_in_pages, D, WIDTH, there), inner, SOFTCAP)
        values = _rows(v_pages + place_in_pages, D, WIDTH, there)
        seen = there[None, :]
        if WINDOW:
            seen = seen & ((at * KEYS + offset)[None, :] > (length + place - WINDOW)[:, None])
        acc, peak, total = _update(tl.where(seen, score, -float("inf")), values, acc, peak, total, factor)

    # Own keys.
    k_own, v_own = k + row * K_STEPS[0] + head * K_STEPS[2], v + row * V_STEPS[0] + head * V_STEPS[2]
    for at in tl.range(split * OWN, count, SPLITS * OWN, num_stages=2):
        index = at + tl.arange(0, OWN)
        key = tl.where(index < clean, index, index + skipped)
        here = index < count
        new_k = _rows(k_own + key * K_STEPS[1], D, WIDTH, here)
        new_v = _rows(v_own + key * V_STEPS[1], D, WIDTH, here)
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

    if SPLITS == 1:
        _give(out, acc / total[:, None], lines, row, head, HEADS, GROUP, QUERIES, D, WIDTH)
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
        block_table: (B, n) int32, the pages of each row in order; entries behind its prefix mean nothing.
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
    wide = max(16, power_of_2(width))
    _attend[triton.cdiv(length * group, chosen.rows), rows * heads, chosen.splits](
        q, k_new, v_new, k_pages, v_pages, block_table, lengths, levels, sinks,
        out, workspace.part, workspace.peaks, workspace.totals, workspace.arrived, inner, factor,
        block_table.stride(0), block_table.shape[1],
        Q_STEPS=q.stride(), K_STEPS=k_new.stride(), V_STEPS=v_new.stride(), PAGE_STEPS=k_pages.stride(),
        HEADS=heads, GROUP=group, QUERIES=length, CAUSAL=causal, BLOCK=block, D=width, WIDTH=wide, PAGE=page,
        WINDOW=window or 0, SOFTCAP=softcap is not None, ROWS=chosen.rows, KEYS=chosen.keys,
        OWN=own_keys(chosen, causal, block, blocks, group), SPLITS=chosen.splits,
        **joining(chosen, length * group, wide), num_warps=chosen.warps, num_stages=chosen.stages, **options(q.device),
    )  # fmt: skip
    return out
