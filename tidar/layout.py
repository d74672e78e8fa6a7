"""Who sees whom: the one idea of TiDAR, as data.

A forward holds two kinds of queries. *Clean* tokens (text, drafts) attend causally; *mask* tokens attend to some
clean prefix and, in both directions, to their own block. So what any query may see is always **two runs of key
slots**: one causal, one block.

- training  ``[x_1 … x_S | mask × S]``: a mask's causal run ends where its block begins (paper, section 3.1)
- prefill   ``[prompt | mask × k]``: the masks are the first draft (paper, section 3.2)
- step      ``[d_1 … d_k | alternates | mask × k | … ]``: block j drafts for "exactly j drafts accepted" (Figure 3)
- causal    ordinary autoregressive decoding
- rollout   one token of many blocks, each continued from its own prefix of a text (training on the model's words)
- masks     a run of the masks of `training`, alone, behind keys of the clean half that are already there

Everything else (dense masks, FlexAttention block masks, cache writes, the pictures in the docs) is derived from a
`Layout`. A sliding window only raises the lower ends of the runs, so nothing downstream knows about it.

Shapes: B rows, L queries, C clean queries, k draft length. Slots count keys within a row; positions count tokens
within a document and are what RoPE sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tidar.errors import TidarError

__all__ = [
    "Layout", "causal", "masks", "packed", "prefill", "rollout", "step", "training",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The queries of one forward, clean ones first, and what each may see.

    Attributes:
        positions: (B, L) int64, position of each query in its document.
        slots: (B, L) int64, the key slot each query's own key is written to.
        causal: (B, L, 2) int64, the run ``[first, end)`` of clean key slots a query sees; its first slot is the
            document's position 0.
        block: (B, L, 2) int64, the run ``[first, end)`` of slots of the query's own mask block; empty for clean ones
            but alternates, which see themselves. In `rollout`, its own continuation.
        clean: number of clean queries C (text, drafts, alternates and padding); queries C … L-1 are mask tokens.
        rows: (R,) int64, the queries whose logits are read.
        kv_len: key slots the forward attends over.
    """

    positions: Tensor
    slots: Tensor
    causal: Tensor
    block: Tensor
    clean: int
    rows: Tensor
    kv_len: int

    @property
    def queries(self) -> int:
        return self.positions.shape[1]

    def tokens(self, clean_BC: Tensor, mask_id: int) -> Tensor:
        """Input ids (B, L): the given clean tokens, then mask tokens."""
        masks = clean_BC.new_full((clean_BC.shape[0], self.queries - self.clean), mask_id)
        return torch.cat([clean_BC, masks], dim=1)

    def windowed(self, window: int | None) -> Layout:
        """The same layout under a sliding window: keys at positions ``> position - window`` only."""
        if window is None:
            return self
        first_seen = self.causal[..., 0] + (self.positions - window + 1).clamp(min=0)
        causal = torch.stack([first_seen, self.causal[..., 1]], -1)
        first_mate = torch.maximum(self.block[..., 0], self.slots - window + 1)
        return replace(self, causal=causal, block=torch.stack([first_mate, self.block[..., 1]], -1))

    def to(self, device: torch.device | str) -> Layout:
        moved = {n: getattr(self, n).to(device) for n in ("positions", "slots", "causal", "block", "rows")}
        return replace(self, **moved)


def _run(first: Tensor | int, end: Tensor, shape: Sequence[int]) -> Tensor:
    first = torch.as_tensor(first, device=end.device)
    return torch.stack([first.expand(*shape), end.expand(*shape)], -1)


def causal(lengths: Sequence[int], new: int = 1, *, device: torch.device | str = "cpu") -> Layout:
    """``new`` clean tokens a row after ``lengths[b]`` cached ones; only the last one's logits are read."""
    base = torch.tensor(lengths, device=device)[:, None]
    slots = base + torch.arange(new, device=device)
    return Layout(
        positions=slots,
        slots=slots,
        causal=_run(0, slots + 1, slots.shape),
        block=torch.zeros(*slots.shape, 2, dtype=torch.long, device=device),
        clean=new,
        rows=torch.tensor([new - 1], device=device),
        kv_len=max(lengths) + new,
    )


def prefill(
    counts: Sequence[int], k: int, *, starts: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> Layout:
    """``[padding | prompt | mask × k]``, read at the last prompt token and the masks.

    Prompts of different lengths are aligned at their ends, so that the rows to read are the same in every row of the
    batch; padding stands *behind* the row's own slots and sees only itself. ``k = 0`` is the autoregressive prefill.

    Args:
        counts: prompt tokens of each row in this forward.
        k: masks that follow.
        starts: tokens of each row already in the cache (a prompt may be prefilled in pieces).
    """
    width = max(counts)
    count = torch.tensor(counts, device=device)[:, None]
    start = torch.tensor(starts if starts is not None else [0] * len(counts), device=device)[:, None]
    column = torch.arange(width + k, device=device)
    index = column - (width - count)  # place among the row's real queries; negative for padding
    real = index >= 0
    end = start + count
    position = start + index
    slots = torch.where(real, position, end + k + column)
    is_mask = column >= width
    block_first = torch.where(is_mask, end, torch.where(real, 0, slots))
    block_end = torch.where(is_mask, end + k, torch.where(real, 0, slots + 1))
    causal_end = torch.where(is_mask, end, torch.where(real, position + 1, 0))
    return Layout(
        positions=torch.where(real, position, 0),
        slots=slots,
        causal=_run(0, causal_end, slots.shape),
        block=torch.stack([block_first, block_end], -1),
        clean=width,
        rows=torch.arange(width - 1, width + k, device=device),
        kv_len=int((start + width).max()) + k,
    )


def step(
    lengths: Sequence[int],
    k: int,
    levels: Tensor | Sequence[int] | None = None,
    masks: int | None = None,
    *,
    alternates: Sequence[int] | Tensor = (),
    pairs: int = 0,
    device: torch.device | str = "cpu",
) -> Layout:
    """``[d_1 … d_k | A alternates | M masks a proposal]`` after ``lengths[b]`` cached tokens (Figure 3 has ``k(k+1)``
    queries, none of them alternates).

    A proposal of level j assumes that exactly j drafts are accepted: its masks stand at positions P+j … P+j+M-1, see
    the prefix and d_1 … d_j, and each other. An alternate of level j stands at P+j, behind d_j in place of d_j+1, and
    sees the prefix, d_1 … d_j and itself; the second of a pair stands at P+j+1 and sees the first too. Read are all
    drafts and alternates and, of each proposal, all masks but the first: that token is the autoregressive one.

    Args:
        lengths: committed tokens of each row, P.
        k: drafts.
        levels: which of 1 … k to draft for, (B, P) integers or the same for all rows; all by default. A tensor's values
            are not checked.
        masks: M, of a proposal; as many as drafts by default.
        alternates: levels of the alternates, as ``levels``; they begin with so many ``pairs``, of one level each.

    Raises:
        TidarError: no drafts, or levels outside 1 … k.
    """
    if k < 1:
        raise TidarError(f"draft length must be at least 1, not {k}")
    width, rows = k if masks is None else masks, len(lengths)
    level = _levels(range(1, k + 1) if levels is None else levels, k, rows, device)
    other, accepted = _levels(alternates, k, rows, device), level.repeat_interleave(width, 1)
    base, draft = torch.tensor(lengths, device=device)[:, None], torch.arange(k, device=device).expand(rows, k)
    place = torch.arange(width, device=device).repeat(level.shape[1])
    clean, queries = k + other.shape[1], k + other.shape[1] + accepted.shape[1]
    slots = base + torch.arange(queries, device=device)
    alone, second = slots[:, k:clean], torch.arange(clean - k, device=device) % 2
    second[2 * pairs :] = 0
    block_first = torch.cat([torch.zeros_like(draft), alone - second, slots[:, clean:] - place], 1)
    block_end = torch.cat([torch.zeros_like(draft), alone + 1, slots[:, clean:] - place + width], 1)
    return Layout(
        positions=base + torch.cat([draft, other + second, accepted + place], 1),
        slots=slots,
        causal=_run(0, base + torch.cat([draft + 1, other, accepted], 1), slots.shape),
        block=torch.stack([block_first, block_end], -1),
        clean=clean,
        rows=torch.cat([torch.arange(clean, device=device), torch.arange(clean, queries, device=device)[place > 0]]),
        kv_len=max(lengths) + queries,
    )


def _levels(given: Sequence[int] | Tensor, k: int, rows: int, device: torch.device | str) -> Tensor:
    if not isinstance(given, Tensor):
        if not all(1 <= level <= k for level in given):
            raise TidarError(f"levels must lie between 1 and the draft length {k}, not {list(given)}")
        given = torch.tensor(list(given), dtype=torch.long, device=device)
    return given.expand(rows, given.shape[-1])


def packed(starts: Tensor) -> Layout:
    """The clean half of `training` alone: autoregressive training on packed documents.

    Args:
        starts: (B, S) int64, slot of the first token of each token's document.
    """
    rows, size = starts.shape
    slots = torch.arange(size, device=starts.device).expand(rows, size)
    return Layout(
        positions=slots - starts,
        slots=slots,
        causal=torch.stack([starts, slots + 1], -1),
        block=torch.zeros(rows, size, 2, dtype=torch.long, device=starts.device),
        clean=size,
        rows=torch.arange(size, device=starts.device),
        kv_len=size,
    )


def training(starts: Tensor, ends: Tensor, k: Tensor | int, phase: Tensor | int = 0) -> Layout:
    """``[x_1 … x_S | mask × S]`` for packed documents (paper, section 3.1 and Figure 2).

    Mask i predicts token i. It sees the clean tokens of its document's *earlier blocks* and its own block of masks,
    never another mask block, never a clean token of its own block, never another document.

    Args:
        starts: (B, S) int64, slot of the first token of each token's document.
        ends: (B, S) int64, one past the slot of its last token.
        k: block length; a tensor keeps compiled code independent of it.
        phase: tokens by which a document's first block is short: decoding starts blocks anywhere, so training should.
    """
    rows, size = starts.shape
    slots = torch.arange(size, device=starts.device).expand(rows, size)
    position = slots - starts
    first = starts + torch.div(position + phase, k, rounding_mode="floor") * k - phase
    block_first, block_end = torch.maximum(starts, first), torch.minimum(ends, first + k)
    nothing = torch.zeros_like(slots)
    return Layout(
        positions=torch.cat([position, position], 1),
        slots=torch.cat([slots, slots + size], 1),
        causal=torch.stack([torch.cat([starts, starts], 1), torch.cat([slots + 1, block_first], 1)], -1),
        block=torch.stack([torch.cat([nothing, block_first + size], 1), torch.cat([nothing, block_end + size], 1)], -1),
        clean=size,
        rows=torch.arange(2 * size, device=starts.device),
        kv_len=2 * size,
    )


def masks(whole: Layout, places: Tensor, real: Tensor) -> Layout:
    """Whole blocks of the masks of a `training` layout, alone: a clean token sees no mask and a mask no other block, so
    they need the clean half's keys, in slots 0 … S-1, and nothing of the other masks.

    Args:
        whole: what `training` made.
        places: (B, L) int64, which of the row's S masks each query is, ascending by one; any for padding.
        real: (B, L) bool, False for padding, which stands at the end of a row and sees only itself.
    """
    query = whole.clean + places
    slots = whole.clean + torch.arange(places.shape[1], device=places.device).expand(places.shape)
    runs = query[..., None].expand(*query.shape, 2)
    block = whole.block.gather(1, runs) - places[:, :1, None]
    return Layout(
        positions=whole.positions.gather(1, query),
        slots=slots,
        causal=torch.where(real[..., None], whole.causal.gather(1, runs), 0),
        block=torch.where(real[..., None], block, torch.stack([slots, slots + 1], -1)),
        clean=0,
        rows=torch.arange(places.shape[1], device=places.device),
        kv_len=whole.clean + places.shape[1],
    )


def rollout(starts: Tensor, firsts: Tensor, ends: Tensor, offset: Tensor | int, size: int) -> Layout:
    """Token ``offset`` of every block of a text's rows, where each block is continued on its own.

    Slots 0 … S-1 hold the text, and slot S + i the token that stands for text token i in its block's continuation. The
    query of a block sees its document before the block, and the continuation so far. Queries of shorter blocks, and
    padding (``firsts == ends``), all share slot S and see nothing else: it belongs to a row's first token, which has
    no prefix and so no continuation.

    Args:
        starts: (B, Q) int64, slot of the first token of each block's document.
        firsts: (B, Q) int64, slot of the block's first token, which is not its document's.
        ends: (B, Q) int64, one past the slot of its last token.
        offset: place in the block.
        size: tokens of a row, S.
    """
    here = firsts + offset
    real = here < ends
    slots = torch.where(real, here, 0) + size
    first = torch.where(real, firsts, 0)
    return Layout(
        positions=torch.where(real, here - starts, 0),
        slots=slots,
        causal=torch.stack([torch.where(real, starts, 0), first], -1),
        block=torch.stack([first + size, slots + 1], -1),
        clean=slots.shape[1],
        rows=torch.arange(slots.shape[1], device=slots.device),
        kv_len=2 * size,
    )
