"""Heads made ready for attention in one launch: q/k norms, rotary embedding, and the write into the paged cache.

Legend: B rows, L queries, Hq query heads, Hk key heads, H head width, A = Hq + 2·Hk. `tidar.kernels.reference_step` is
the plain twin.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.attention_kernel import place_of
from tidar.kernels.pdl import begin, options
from tidar.kernels.reference import check_levels
from tidar.kernels.reference_step import check_rotate
from tidar.kernels.rotary import columns, turned
from tidar.kernels.workspace import power_of_2

__all__ = ["rotate"]


@triton.jit
def _rotate(
    heads, q, k, q_norm, k_norm, cos, sin, levels, lengths, counts, k_pages, v_pages, table, eps,
    page_step, slot_step, head_step, table_step, table_width, positions,
    Q: tl.constexpr, K: tl.constexpr, Q_UP: tl.constexpr, K_UP: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    QUERIES: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr, PAIRS: tl.constexpr,
    LEVEL_STEP: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One query; program 1 of it takes keys and values."""
    begin(PDL)
    query, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line = row * QUERIES + query
    base = heads + line * (Q + 2 * K) * H
    length = tl.load(lengths + row)
    place = query
    if BLOCK:
        place, _ = place_of(query, levels + row * LEVEL_STEP, True, CAUSAL, BLOCK, OTHERS, PAIRS)
    position = tl.minimum(length + place, positions - 1)
    column, inside = columns(H, WIDTH)
    column, inside = column[None, :], inside[None, :]

    if tl.program_id(2) == 0:
        head = tl.arange(0, Q_UP)[:, None]
        new_q = turned(base + head * H, head < Q, q_norm, eps, cos, sin, position, H, WIDTH)
        tl.store(q + line * Q * H + head * H + column, new_q.to(q.dtype.element_ty), mask=(head < Q) & inside)
    else:
        kv = tl.arange(0, K_UP)[:, None]
        wanted = (kv < K) & inside
        keys = base + Q * H
        new_k = turned(keys + kv * H, kv < K, k_norm, eps, cos, sin, position, H, WIDTH).to(k.dtype.element_ty)
        tl.store(k + line * K * H + kv * H + column, new_k, mask=wanted)
        slot = length + query
        # Behind the table's last page there is another row's table.
        written = (query < tl.load(counts + row)) & (slot < table_width * PAGE)
        page = tl.load(table + row * table_step + slot // PAGE, mask=written, other=0).to(tl.int64)
        there = page * page_step + slot % PAGE * slot_step + kv * head_step + column
        value = tl.load(keys + (K + kv) * H + column, mask=wanted, other=0.0)
        tl.store(k_pages + there, new_k, mask=wanted & written)
        tl.store(v_pages + there, value, mask=wanted & written)


def rotate(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm and rotate queries and keys; write the first ``counts[b]`` keys and values behind row b's prefix.

    All causal queries of a step are written before anything is accepted (0 for rows that rest): committing then only
    moves ``lengths``, and the next step overwrites what was rejected, as in `tidar.cache`. `attend` reads nothing at or
    behind ``lengths``.

    Args:
        heads: (B, L, A, H) contiguous: queries, keys and values as projected.
        q_norm: (H,) weight of the RMS norm of query heads, or None.
        k_norm: (H,) of key heads; both or neither.
        cos: (positions, H) contiguous, of the rotary embedding, a row's halves the same; positions behind its end take
            its last row.
        sin: likewise.
        k_pages: (pages, page_size, Hk, H), written in place.
        v_pages: the same.
        block_table: (B, n) int32; tokens behind its last page are dropped.
        lengths: (B,) int32, committed tokens of each row.
        counts: (B,) int32 in 0 … L.
        levels: (A + P,) or (B, A + P) integers, as of `tidar.kernels.step_attention.attend`; they, ``causal``,
            ``alternates`` and ``pairs`` say where the queries stand.
        eps: of the norms.
        causal: C.
        alternates: A.
        pairs: of them.

    Returns:
        Queries (B, L, Hq, H), keys (B, L, Hk, H), and values (B, L, Hk, H), which are a view of ``heads``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    query_heads = check_rotate(heads, q_norm, k_norm, cos, sin, k_pages, v_pages, block_table, lengths, counts)
    block = check_levels(levels, heads.shape[0], heads.shape[1], causal, alternates, pairs)
    rows, queries, _, width = heads.shape
    kv_heads = k_pages.shape[2]
    q = torch.empty(rows, queries, query_heads, width, dtype=heads.dtype, device=heads.device)
    k = torch.empty(rows, queries, kv_heads, width, dtype=heads.dtype, device=heads.device)
    _rotate[queries, rows, 2](
        heads, q, k, q_norm, k_norm, cos, sin, levels, lengths, counts, k_pages, v_pages, block_table, eps,
        *k_pages.stride()[:3], block_table.stride(0), block_table.shape[1], cos.shape[0],
        Q=query_heads, K=kv_heads, Q_UP=power_of_2(query_heads), K_UP=power_of_2(kv_heads), H=width,
        WIDTH=power_of_2(width), QUERIES=queries, CAUSAL=causal,
        BLOCK=block, OTHERS=alternates, PAIRS=pairs,
        LEVEL_STEP=levels.stride(0) if levels.dim() > 1 else 0, PAGE=k_pages.shape[1],
        **options(heads.device),
    )  # fmt: skip
    return q, k, heads[:, :, query_heads + kv_heads :]
