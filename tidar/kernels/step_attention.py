"""Attention of a decoding step in one launch and one pass over the prefix, as a Triton kernel.

All queries of a step see the same prefix, drafts and masks alike; only the keys that the step itself brings are seen
by some and not by others. So the G query heads of a key head and the L queries are folded into one axis of L·G query
rows, cut into tiles; a tile walks over the prefix, then over the few own keys that its queries may see: the causal
tokens, and the alternates and blocks of masks that lie in the tile. Which query sees which of them is index arithmetic.

The softmax is computed online, with the sum divided out at the end (FlashAttention-2, Dao 2023). A step has few
query rows for a large GPU, so a tile's keys are split among programs (Flash-Decoding, Dao et al. 2023), and the last of
them joins the parts (`tidar.kernels.attention_parts`).

`attend` is given queries and keys that `tidar.kernels.rotate` made ready; `rotate_attend` takes the heads as projected
and does that work too, in the same launch. Every tile then norms and turns the own keys that it sees for itself: right
where they are few, as in a step, and not in a long prompt.

Lengths, levels and page tables are read on the device only: grid and shapes depend on static sizes, so a step can be
captured in a CUDA graph. The kernel is `tidar.kernels.attention_kernel`; `tidar.kernels.reference` and
`tidar.kernels.reference_step` are the plain twins.

Legend: B rows, L queries, C causal ones, A alternates, P blocks of M masks, Hq = G·Hk query heads, Hk key
heads, D head width.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.attention_kernel import LOG2E, attention, join
from tidar.kernels.pdl import EARLY, LATE, options
from tidar.kernels.reference import check_step
from tidar.kernels.reference_step import check_rotate
from tidar.kernels.workspace import Workspace, joining, own_keys, power_of_2

__all__ = ["attend", "rotate_attend"]

FEW, MANY = 16, 64
"""Query rows of a program that joins parts, and of a tile from which on a launch does so."""
FLIGHT = 4
"""Splits that are joined at a time where that must not depend on the step."""
TURNED = 32
"""Own keys at a time that are turned as well: beside a tile's sums, registers hold no more."""


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
    alternates: int = 0,
    pairs: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cached: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Attention of one layer in one decoding step (paper, section 3.2 and Figure 3).

    Query i < C is a causal token at position ``lengths[b] + i`` and sees the prefix and causal tokens 0 … i. Mask m of
    block p is at position ``lengths[b] + levels[p] + m`` and sees the prefix, the first ``levels[p]`` causal tokens and
    all masks of its block. Between the two stand A alternates: one of level n is at position ``lengths[b] + n`` and
    sees the prefix, the first n causal tokens and itself. The second of a pair is at the next position and sees the
    first too. The first A ``levels`` are theirs.

    Args:
        q: (B, L, Hq, D) float32, float16 or bfloat16, rotary embedding applied, as all of the next four.
        k_new: (B, L, Hk, D), the step's own keys; they need not be in the pages.
        v_new: (B, L, Hk, D).
        k_pages: (pages, page_size, Hk, D), the committed prefixes.
        v_pages: the same.
        block_table: (B, n) int32, the pages of each row in order; entries behind its prefix mean nothing.
        lengths: (B,) int32, committed tokens of each row, at most ``n · page_size``.
        levels: (A + P,) integers in 0 … C, the causal tokens that each alternate and each block of masks sees, those of
            a pair the same, or (B, A + P), each row's own. Not
            checked: they stay on the device.
        causal: C; of the other L - C queries A are alternates, the rest P equal blocks.
        alternates: A.
        pairs: how many pairs they begin with.
        scale: factor on the scores; 1/sqrt(D) by default.
        window: a query sees keys at positions ``> position - window`` only.
        softcap: scores become ``softcap · tanh(scores / softcap)``.
        sinks: (Hq,), one extra logit a head.
        cached: (B,) int32 in 0 … C, causal tokens of each row whose keys and values are in the pages already, as
            `tidar.kernels.rotate.rotate` left them; others are not seen, nor are those in ``k_new``. With it, and one
            choice of tiles, a causal query's result is the same bits in whichever step it is.
        out: (B, L, Hq, D) contiguous, where to write.
        workspace: made for these sizes. Made anew without; give one, and ``out``, where nothing may be allocated.

    Raises:
        TidarError: arguments that do not fit together.
    """
    bounds = scale, window, softcap
    shape = causal, alternates, pairs
    check_step(q, k_new, v_new, k_pages, v_pages, block_table, lengths, levels, *shape, *bounds, sinks)
    cache = k_pages, v_pages, block_table, lengths
    rotary = None if cached is None else (None, None, None, None, cached)
    return _launch(q, k_new, v_new, rotary, *cache, levels, 0.0, *shape, *bounds, sinks, out, workspace)


def rotate_attend(
    heads: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    counts: Tensor,
    levels: Tensor,
    *,
    eps: float,
    causal: int,
    alternates: int = 0,
    pairs: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """`tidar.kernels.rotate.rotate` and `attend` in one launch: the same positions, roundings and cache.

    Args:
        heads: (B, L, A, D) contiguous, A = Hq + 2·Hk: queries, keys and values as projected, in a dtype of `attend`.
        q_norm, k_norm, cos, sin: as of `rotate`.
        k_pages: (pages, page_size, Hk, D), read before ``lengths`` and written behind.
        v_pages: the same.
        block_table: (B, n) int32; what it has no page for is not written.
        lengths: (B,) int32, committed tokens of each row.
        counts: (B,) int32 in 0 … C, causal tokens of each row whose keys and values are written.
        levels: (A + P,) or (B, A + P) integers in 0 … C.
        eps: of the norms.
        causal, alternates, pairs, scale, window, softcap, sinks, out, workspace: as of `attend`.

    Returns:
        (B, L, Hq, D).

    Raises:
        TidarError: arguments that do not fit together.
    """
    cache = k_pages, v_pages, block_table, lengths
    query_heads = check_rotate(heads, q_norm, k_norm, cos, sin, *cache, counts)
    q, k, v = heads.split([query_heads, k_pages.shape[2], k_pages.shape[2]], 2)
    bounds = scale, window, softcap
    shape = causal, alternates, pairs
    check_step(q, k, v, *cache, levels, *shape, *bounds, sinks)
    rotary = q_norm, k_norm, cos, sin, counts
    return _launch(q, k, v, rotary, *cache, levels, eps, *shape, *bounds, sinks, out, workspace)


def _launch(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    rotary: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor] | None,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    levels: Tensor,
    eps: float,
    causal: int,
    alternates: int,
    pairs: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor | None,
    workspace: Workspace | None,
) -> Tensor:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TidarError(f"the kernel has no {q.dtype}: use tidar.kernels.reference")
    rows, length, query_heads, width = q.shape
    heads, page, blocks = k_new.shape[2], k_pages.shape[1], levels.shape[-1] - alternates
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
    group = query_heads // heads
    block = (length - causal - alternates) // blocks if blocks else 0
    inner = (width**-0.5 if scale is None else scale) / (softcap or 1)
    factor = LOG2E.value * (softcap or inner)
    wide = max(16, power_of_2(width))
    turned, cached = (rotary[2], rotary[2] is None) if rotary else (None, False)
    own = own_keys(chosen, 0 if cached else causal, block, blocks, group, alternates)
    joined = joining(chosen, length * group, wide)
    if cached:
        joined["FLIGHT"] = min(FLIGHT, chosen.splits)  # not as many as this step has registers for
    # Which products and sums the compiler makes one is its choice, and it may choose otherwise for another step.
    contraction = {"enable_fp_fusion": False} if cached else {}
    cuts, each = triton.cdiv(length * group, chosen.rows), rows * heads
    fixed = {
        "HEADS": heads, "GROUP": group, "QUERIES": length, "D": width, "WIDTH": wide,
        "ROWS": chosen.rows, "SPLITS": chosen.splits, "HELD": joined["HELD"], "FLIGHT": joined["FLIGHT"],
    }  # fmt: skip
    # The parts of many rows are too much for the last program to come: while it reads them, all others have gone. Wider
    # heads have as many programs for fewer rows, and so compiled they spill.
    apart = chosen.splits > 1 and joined["HELD"] >= MANY and wide <= 128
    attention[cuts, each, chosen.splits](
        q, k_new, v_new, *(rotary or [None] * 5), k_pages, v_pages, block_table, lengths, levels, sinks,
        out, workspace.part, workspace.peaks, workspace.totals, workspace.arrived, inner, factor,
        eps, 0 if turned is None else turned.shape[0], block_table.stride(0), block_table.shape[1],
        Q_STEPS=q.stride(), K_STEPS=k_new.stride(), V_STEPS=v_new.stride(), PAGE_STEPS=k_pages.stride(),
        CAUSAL=causal, BLOCK=block, OTHERS=alternates, PAIRS=pairs,
        LEVEL_STEP=levels.stride(0) if levels.dim() > 1 else 0, PAGE=page,
        WINDOW=window or 0, SOFTCAP=softcap is not None, KEYS=chosen.keys,
        OWN=own if turned is None else min(own, TURNED), FEW=joined["FEW"], APART=apart, **fixed,
        num_warps=chosen.warps, num_stages=chosen.stages, **contraction,
        **options(q.device, when=LATE if chosen.rows < 64 else EARLY),
    )  # fmt: skip
    if apart:
        join[cuts, each, joined["HELD"] // FEW](
            out, workspace.part, workspace.peaks, workspace.totals, FEW=FEW, num_warps=4, **fixed,
            **contraction, **options(q.device),
        )  # fmt: skip
    return out
