"""A `Layout` rendered for an attention kernel, or for the eye.

`dense` is the definition; `block_mask` is what FlexAttention runs on, built from the runs' ends alone, so that no
(L, L) tensor ever exists; `picture` is what the documentation shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tidar.layout import Layout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Kind", "Masks", "block_mask", "dense", "picture", "render"]

Kind = Literal["dense", "block"]

Masks = dict[int | None, Any]
"""What the attention function is given: for each sliding window of the model (None: no window) a boolean tensor
(B, 1, L, S), a `BlockMask`, or None where every query sees every key."""

BLOCK = 128  # FlexAttention's default tile


def render(layout: Layout, windows: Iterable[int | None] = (None,), kind: Kind = "dense") -> Masks:
    """Masks for every sliding window a model has, made once a forward and shared by its layers."""
    make = dense if kind == "dense" else block_mask
    return {w: None if _sees_all(layout, w) else make(layout.windowed(w)) for w in windows}


def _sees_all(layout: Layout, window: int | None) -> bool:
    # One token after equally long prefixes: plain decoding needs no mask, and SDPA is faster without.
    if layout.queries != 1 or (window is not None and layout.kv_len > window):
        return False
    return bool((layout.causal[..., 0] == 0).all() and (layout.causal[..., 1] == layout.kv_len).all())


def dense(layout: Layout) -> Tensor:
    """(B, 1, L, S) bool, True where query l sees key slot s."""
    slot = torch.arange(layout.kv_len, device=layout.slots.device)
    seen = (slot >= layout.causal[..., :1]) & (slot < layout.causal[..., 1:])
    seen |= (slot >= layout.block[..., :1]) & (slot < layout.block[..., 1:])
    return seen[:, None]


def block_mask(layout: Layout, tile: int = BLOCK) -> BlockMask:
    """FlexAttention's sparse mask; tiles no query sees are skipped, tiles every query sees are not tested."""
    from torch.nn.attention.flex_attention import BlockMask

    causal, block = layout.causal, layout.block
    rows, queries, keys = causal.shape[0], layout.queries, layout.kv_len
    tiles_q, tiles_k = -(-queries // tile), -(-keys // tile)
    first = torch.arange(tiles_k, device=causal.device) * tile
    last = first + tile

    def touches(run: Tensor) -> Tensor:
        lo, hi = run[..., :1], run[..., 1:]
        return (lo < hi) & (lo < last) & (hi > first)

    def covers(run: Tensor) -> Tensor:
        return (run[..., :1] <= first) & (run[..., 1:] >= last)

    def by_tile(flag_BLT: Tensor, fill: bool) -> Tensor:
        spare = tiles_q * tile - queries
        padded = torch.nn.functional.pad(flag_BLT, (0, 0, 0, spare), value=fill)
        return padded.view(rows, tiles_q, tile, tiles_k)

    some = by_tile(touches(causal) | touches(block), False).any(2)
    whole = by_tile(covers(causal) | covers(block), True).all(2) & some
    partial = some & ~whole

    def listed(flag_BQT: Tensor) -> tuple[Tensor, Tensor]:
        count = flag_BQT.sum(-1, dtype=torch.int32)
        order = torch.argsort(flag_BQT.int(), dim=-1, descending=True, stable=True).int()
        return count[:, None].contiguous(), order[:, None].contiguous()

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        in_causal = (kv >= causal[b, q, 0]) & (kv < causal[b, q, 1])
        return in_causal | ((kv >= block[b, q, 0]) & (kv < block[b, q, 1]))

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(whole), BLOCK_SIZE=tile, mask_mod=sees, seq_lengths=(queries, keys)
    )


def picture(layout: Layout, labels: Sequence[str], axes: Any, *, row: int = 0) -> None:
    """Draw one batch row onto matplotlib ``axes``: queries down, keys across, causal and block runs in two colours.

    Args:
        layout: what to draw; its key slots must all be covered by ``labels``.
        labels: one short label for each key slot; the queries' are taken from their slots.
        axes: a ``matplotlib.axes.Axes``.
        row: batch row.
    """
    keys = len(labels)
    slot = torch.arange(keys)
    shade = torch.zeros(layout.queries, keys, 3) + 0.96
    for run, colour in ((layout.causal[row], (0.27, 0.51, 0.71)), (layout.block[row], (0.93, 0.58, 0.22))):
        shade[(slot >= run[:, :1]) & (slot < run[:, 1:])] = torch.tensor(colour)
    axes.imshow(shade.numpy(), aspect="equal", interpolation="nearest")
    axes.set_xticks(range(keys), labels, fontsize=7)
    axes.set_yticks(range(layout.queries), [labels[int(s)] for s in layout.slots[row]], fontsize=7)
    axes.set_xticks([x - 0.5 for x in range(keys)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(layout.queries)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    axes.xaxis.tick_top()
