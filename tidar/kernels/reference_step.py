"""What the kernels of `tidar.kernels.rotate` and `tidar.kernels.accept` compute, written plainly, by the same names.

And `rotate_attend` of `tidar.kernels.step_attention`, which is this `rotate` and the `attend` of `reference`.

`rotate`, `rotate_attend` and `accept` read lengths, counts, tickets and samples on the host.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from tidar.errors import TidarError
from tidar.kernels.reference import attend, by_row, check_levels, check_pages, write_kv
from tidar.proposals import RUNNERS_UP, alternates, outcomes, paired, ranks
from tidar.proposals import levels as likeliest

__all__ = ["HEAD", "Picking", "Runners", "accept", "check_rotate", "embed", "rotate", "rotate_attend"]


HEAD = 5
"""Numbers of the ring's entries before the tokens (`accept`)."""


SLOT_BITS = 22
"""Of a successor: its slot, below it so many bits of its token, and 32 of its odds."""


class Runners(NamedTuple):
    """What came next when each of R drafts was chosen, and what would have been drafted behind it.

    Once as it is, or for a chain of drafts as its kernels leave it, to be found out by whoever asks.
    """

    tokens: Tensor
    """(B, R, `tidar.proposals.RUNNERS_UP`) int64, the best first; of a chain its shortlists, (N, S) int32."""
    followers: Tensor
    """(B, R, `tidar.proposals.RUNNERS_UP`) int64, drafts behind these tokens, 0 behind the last; of a chain (B, R, S)
    int64, the successors (`tidar.kernels.shortlists`) of each token of the list before."""
    scores: Tensor | None = None
    """(B, R, S, S) float32: behind each token of the list before, what each token of the list was chosen by."""
    came: Tensor | None = None
    """(B, R) int32: which token of the list before came."""
    listed: Tensor | None = None
    """(B, R) int32: which of the N shortlists is a draft's."""

    def best(self) -> tuple[Tensor, Tensor]:
        """The runners-up and what follows them, both (B, R, `tidar.proposals.RUNNERS_UP`) int64."""
        if self.scores is None or self.came is None or self.listed is None:
            return self.tokens, self.followers
        rows = self.came.long()[:, :, None, None].expand(-1, -1, 1, self.scores.shape[3])
        order = self.scores.gather(2, rows)[:, :, 0].sort(dim=2, descending=True, stable=True).indices
        order = order[:, :, 1 : 1 + RUNNERS_UP]
        behind = (self.followers >> 32 & (1 << SLOT_BITS) - 1).roll(-1, 1)
        behind[:, -1] = 0
        return self.tokens[self.listed.long()].long().gather(2, order), behind.gather(2, order)


class Picking(NamedTuple):
    """Memory for `tidar.proposals` on the device."""

    chances: Tensor
    """(B, at least K) float32, of the drafts; the first, which is certain, is not read."""
    places: Tensor
    """(B, K) int64 contiguous: `tidar.proposals.ranks` go there."""
    levels: Tensor
    """(B, A + P) int64 contiguous: those of `tidar.proposals.alternates` go there, and `tidar.proposals.levels`."""
    runners: Runners | None = None
    """Of the drafts behind the certain token; what is left of earlier ones is as good, as far as exactness goes."""
    alternates: Tensor | None = None
    """(B, A) int64 contiguous: alternates go there."""
    pairs: int = 0
    """How many pairs they begin with: an alternate, and what would have been drafted behind it."""


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
    """As `tidar.kernels.rotate.rotate`."""
    query_heads = check_rotate(heads, q_norm, k_norm, cos, sin, k_pages, v_pages, block_table, lengths, counts)
    block = check_levels(levels, heads.shape[0], heads.shape[1], causal, alternates, pairs)
    kv_heads = k_pages.shape[2]
    q, k, v = heads.split([query_heads, kv_heads, kv_heads], 2)
    if q_norm is not None and k_norm is not None:
        q, k = _normed(q, q_norm, eps), _normed(k, k_norm, eps)
    levels = by_row(levels, len(heads))
    masks = levels[:, alternates:, None] + torch.arange(block, device=levels.device)
    first = torch.arange(causal, device=levels.device).expand(len(heads), causal)
    others = levels[:, :alternates].clone()
    others[:, 1 : 2 * pairs : 2] += 1
    offsets = torch.cat([first, others, masks.flatten(1)], 1)
    at = (lengths[:, None] + offsets).clamp(max=cos.shape[0] - 1)
    turn = cos[at][:, :, None], sin[at][:, :, None]
    q, k = _turned(q, *turn), _turned(k, *turn)
    write_kv(k, v, k_pages, v_pages, block_table, lengths, counts)
    return q, k, v


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
    **options: Any,
) -> Tensor:
    """As `tidar.kernels.step_attention.rotate_attend`: one after the other."""
    cache = k_pages, v_pages, block_table, lengths
    rotary = q_norm, k_norm, cos, sin
    q, k, v = rotate(heads, *rotary, *cache, counts, levels, eps=eps, causal=causal, alternates=alternates, pairs=pairs)
    return attend(q, k, v, *cache, levels, causal=causal, alternates=alternates, pairs=pairs, **options)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def embed(
    drafts: Tensor, table: Tensor, mask_id: int, queries: int, count: int, *, picking: Picking | None = None
) -> Tensor:
    """As `tidar.kernels.accept.embed`."""
    clean = drafts[:, :count]
    if picking is not None:
        chances, others = picking.chances[:, 1:count], 0
        picking.places.copy_(ranks(chances))
        if picking.runners is not None and picking.alternates is not None:
            row = torch.arange(len(drafts), device=drafts.device)[:, None]
            others = picking.alternates.shape[1]
            below, rank = alternates(outcomes(chances), others - picking.pairs)
            tokens, followers = (named[row, below - 1, rank] for named in picking.runners.best())
            picking.levels[:, :others] = paired(below, below, picking.pairs)
            picking.alternates.copy_(paired(tokens, followers, picking.pairs))
            clean = torch.cat([clean, picking.alternates], 1)
        picking.levels[:, others:] = likeliest(picking.places, picking.levels.shape[1] - others)
    return embedding(pad(clean, (0, queries - clean.shape[1]), value=mask_id), table)


def accept(
    sampled: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    limits: Tensor,
    tickets: Tensor,
    ring: Tensor,
    bad: Tensor,
    *,
    levels: Tensor,
    places: Tensor | None,
    alternates: Tensor | None = None,
    pairs: int = 0,
    masks: int,
    queries: int,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `tidar.kernels.accept.accept`."""
    others = 0 if alternates is None else alternates.shape[1]
    rows, count = len(sampled), sampled.shape[1] - others
    below, levels, told, sampled = levels[:, :others], levels[:, others:], sampled[:, count:], sampled[:, :count]
    n = 1 + (sampled[:, :-1] == drafts[:, 1:count]).cumprod(1).sum(1)
    block = (levels <= n[:, None]).sum(1) - 1
    behind = torch.full_like(n, masks)
    if levels.shape[1]:
        behind = torch.where(block < 0, behind, n - levels.gather(1, block.clamp(min=0)[:, None])[:, 0])
    follow, each = sampled.gather(1, n[:, None] - 1), torch.arange(rows, device=n.device)
    met, given = torch.full_like(n, -1), torch.zeros_like(n)
    if alternates is not None and others and masks > 1:
        same = (alternates == follow) & (below == n[:, None])
        same[:, 1 : 2 * pairs : 2] = False
        at = same.int().argmax(1)
        has_second = at < 2 * pairs
        right = has_second & (alternates[each, at + has_second] == told[each, at]) & (masks > 2)
        given = torch.where(same.any(1), 1 + right.int(), 0)
        met = torch.where(same.any(1), torch.where(has_second, at // 2, at - pairs), met)
        drafts[:, 1] = torch.where(given > 0, told[each, at], drafts[:, 1])
        if masks > 2:
            drafts[:, 2] = torch.where(given > 1, told[each, at + has_second], drafts[:, 2])
    for b, (stand, ticket) in enumerate(zip(n.tolist(), tickets.tolist(), strict=True)):
        entry = ring[ticket % len(ring), b]
        entry[0] = -1 if bad.item() else stand
        entry[1] = behind[b]
        if places is not None:
            entry[2] = places[b, stand - 1]
        entry[3], entry[4] = met[b], given[b]
        entry[HEAD : HEAD + stand] = sampled[b, :stand]
        if seen is not None:
            seen[b, sampled[b, :stand]] = True
    tickets += 1
    drafts[:, 0] = follow[:, 0]
    lengths.copy_(torch.minimum(lengths + n, limits))
    place = torch.arange(1, masks, device=n.device) + behind[:, None]
    first, block = torch.arange(rows, device=n.device) * queries + count, block.clamp(min=0)
    states = first[:, None] + others + block[:, None] * masks + place.clamp(max=masks - 1)
    return states.int(), place < masks, given.int()


def check_rotate(
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
) -> int:
    """The number of query heads; `TidarError` unless the arguments fit together."""
    if heads.dim() != 4 or not heads.is_contiguous():
        raise TidarError(f"heads must be contiguous (B, L, A, H), not {tuple(heads.shape)}")
    kv_heads = k_pages.shape[2]
    query_heads = heads.shape[2] - 2 * kv_heads
    if query_heads < kv_heads or query_heads % kv_heads:
        raise TidarError(f"{heads.shape[2]} heads are not queries and {kv_heads} keys and values each")
    new = heads[:, :, -kv_heads:]
    check_pages(new, new, k_pages, v_pages, block_table, lengths)
    if counts.shape != lengths.shape or counts.dtype != torch.int32:
        raise TidarError(f"counts must be int32 of shape {tuple(lengths.shape)}")
    if heads.shape[3] % 2:
        raise TidarError(f"heads of width {heads.shape[3]} have no halves to be turned")
    if cos.shape[1:] != heads.shape[3:] or sin.shape != cos.shape or not (cos.is_contiguous() and sin.is_contiguous()):
        raise TidarError(f"cos and sin must be contiguous (positions, {heads.shape[3]}), not {tuple(cos.shape)}")
    if (q_norm is None) != (k_norm is None):
        raise TidarError("queries and keys are normed both or not at all")
    return query_heads
