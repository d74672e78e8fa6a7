"""The write of a step's keys and values into the paged cache; `tidar.kernels.reference` is the plain twin.

Legend: B rows, C causal tokens of a step, Hk key heads, D head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.reference import check_pages
from tidar.kernels.workspace import power_of_2

__all__ = ["write_kv"]


@triton.jit
def _write(
    k, v, k_pages, v_pages, table, lengths, counts,
    k_row, k_query, k_head, v_row, v_query, v_head,
    page_step, slot_step, head_step, table_step, table_width,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
) -> None:  # fmt: skip
    """One token of one row."""
    token, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.load(lengths + row) + token
    # Behind the table's last page there is another row's table.
    wanted = (token < tl.load(counts + row)) & (slot < table_width * PAGE)
    page = tl.load(table + row * table_step + slot // PAGE, mask=wanted, other=0).to(tl.int64)
    head, column = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = wanted & (head < HEADS) & (column < D)
    there = page * page_step + slot % PAGE * slot_step + head * head_step + column
    new_k = tl.load(k + row * k_row + token * k_query + head * k_head + column, mask=inside)
    new_v = tl.load(v + row * v_row + token * v_query + head * v_head + column, mask=inside)
    tl.store(k_pages + there, new_k, mask=inside)
    tl.store(v_pages + there, new_v, mask=inside)


def write_kv(
    k_new: Tensor,
    v_new: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    counts: Tensor,
) -> None:
    """Write the first ``counts[b]`` of a step's causal tokens behind row b's prefix; lengths stay as they are.

    Meant to be called by each layer, before anything is accepted, with all C drafts, 0 for finished rows: committing
    then only moves ``lengths``, and the next step overwrites what was rejected, as in `tidar.cache`. So no layer's keys
    need be kept until the step's end, and nothing stands between acceptance and the next step. `attend` reads nothing
    at or behind ``lengths``, so the order of the two does not matter.

    Args:
        k_new: (B, C, Hk, D), the causal part of the step's keys, ``k_new[:, :C]``.
        v_new: (B, C, Hk, D).
        k_pages: (pages, page_size, Hk, D), written in place.
        v_pages: the same.
        block_table: (B, n) int32; tokens behind its last page are dropped.
        lengths: (B,) int32, committed tokens of each row.
        counts: (B,) int32 in 0 … C.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_pages(k_new, v_new, k_pages, v_pages, block_table, lengths)
    if counts.shape != lengths.shape or counts.dtype != torch.int32:
        raise TidarError(f"counts must be int32 of shape {tuple(lengths.shape)}")
    rows, tokens, heads, width = k_new.shape
    _write[tokens, rows](
        k_new, v_new, k_pages, v_pages, block_table, lengths, counts,
        *k_new.stride()[:3], *v_new.stride()[:3], *k_pages.stride()[:3], block_table.stride(0), block_table.shape[1],
        HEADS=heads, HEADS_UP=power_of_2(heads), D=width, WIDTH=power_of_2(width), PAGE=k_pages.shape[1],
    )  # fmt: skip
