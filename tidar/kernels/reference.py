"""What the kernels of `tidar.kernels.step_attention` compute, written plainly; the path taken without a GPU.

Same names, same arguments. A step's queries are C causal tokens, then P blocks of M masks (paper, section 3.2), with A
alternates between them, which are tokens that might follow some of the causal ones:

- TiDAR's step: C = M = k, block p with level n_p (proposal "n_p drafts accepted");
- the draft forward of two-forward decoding: C certain tokens, one block of masks with level C;
- verification, or an ordinary autoregressive step: C tokens, no block.

The committed prefix lies in a paged cache: token i of row b is in slot ``i % page_size`` of page
``block_table[b, i // page_size]``.

Legend: B rows, L = C + P·(A + M) queries, Hq query heads, Hk key heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidar.errors import TidarError

__all__ = ["attend", "by_row", "check_levels", "check_pages", "check_step", "visible", "write_kv"]


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
    cached: object = None,
    out: Tensor | None = None,
    workspace: object = None,
) -> Tensor:
    """Attention of one layer in one decoding step; arguments as `tidar.kernels.step_attention.attend`.

    Any floating dtype, float64 included; ``cached`` and ``workspace`` are not read. Reads ``lengths`` and ``levels`` on
    the host.
    """
    bounds = scale, window, softcap
    shape = causal, alternates, pairs
    check_step(q, k_new, v_new, k_pages, v_pages, block_table, lengths, levels, *shape, *bounds, sinks)
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[2] // k_new.shape[2]
    out = torch.empty_like(q) if out is None else out
    below = by_row(levels, len(q)).tolist()
    for b, length in enumerate(lengths.tolist()):
        keys = torch.cat([_prefix(k_pages, block_table[b], length), k_new[b]]).to(wide).repeat_interleave(group, 1)
        values = torch.cat([_prefix(v_pages, block_table[b], length), v_new[b]]).to(wide).repeat_interleave(group, 1)
        scores = torch.einsum("lhd,shd->hls", q[b].to(wide), keys) * factor
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = visible(length, q.shape[1], causal, below[b], window, alternates, pairs).to(q.device)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:  # one more logit a head, whose value is zero
            sink = sinks.to(wide)[:, None, None].expand(-1, q.shape[1], 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1)[..., : keys.shape[0]]
        out[b] = torch.einsum("hls,shd->lhd", weights, values).to(q.dtype)
    return out


def by_row(levels: Tensor, rows: int) -> Tensor:
    """(B, A + P): levels that all rows share, or each its own."""
    return levels.expand(rows, levels.shape[-1])


def visible(
    length: int, queries: int, causal: int, levels: list[int], window: int | None, alternates: int = 0, pairs: int = 0
) -> Tensor:
    """(L, length + L) bool: what each query sees of the prefix and then of the step's own keys."""
    clean, others, levels = causal + alternates, levels[:alternates], levels[alternates:]
    block = (queries - clean) // len(levels) if levels else 0
    second = [i % 2 if i < 2 * pairs else 0 for i in range(alternates)]
    stand = [n + late for n, late in zip(others, second, strict=True)]
    position = [length + i for i in [*range(causal), *stand, *(n + m for n in levels for m in range(block))]]
    seen = torch.zeros(queries, length + queries, dtype=torch.bool)
    for i in range(causal):
        seen[i, : length + i + 1] = True
    for i, level in enumerate(others, causal):
        seen[i, : length + level] = True
        seen[i, length + i - second[i - causal] : length + i + 1] = True
    for p, level in enumerate(levels):
        first = clean + p * block
        seen[first : first + block, : length + level] = True
        seen[first : first + block, length + first : length + first + block] = True
    if window is not None:
        at = torch.tensor(list(range(length)) + position)
        seen &= at > torch.tensor(position)[:, None] - window
    return seen


def write_kv(
    k_new: Tensor,
    v_new: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    counts: Tensor,
) -> None:
    """Write the first ``counts[b]`` of a step's keys and values (B, L, Hk, D) behind row b's prefix; lengths stay."""
    check_pages(k_new, v_new, k_pages, v_pages, block_table, lengths)
    size = k_pages.shape[1]
    for b, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        for i in range(min(count, k_new.shape[1], block_table.shape[1] * size - length)):
            page, slot = int(block_table[b, (length + i) // size]), (length + i) % size
            k_pages[page, slot] = k_new[b, i]
            v_pages[page, slot] = v_new[b, i]


def _prefix(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """(length, Hk, D): a row's committed keys or values, in order."""
    used = table[: -(-length // pages.shape[1])].long()
    return pages[used].flatten(0, 1)[:length]


def check_pages(
    k_new: Tensor, v_new: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, lengths: Tensor
) -> None:
    """`TidarError` unless new tokens and pages fit together."""
    if k_new.dim() != 4 or v_new.shape != k_new.shape:
        raise TidarError(f"new keys and values must both be (B, L, Hk, D), not {_shapes(k_new, v_new)}")
    if k_pages.dim() != 4 or v_pages.shape != k_pages.shape or k_pages.shape[2:] != k_new.shape[2:]:
        raise TidarError(
            f"pages must be (pages, page_size, Hk, D) as {_shapes(k_new)}, not {_shapes(k_pages, v_pages)}"
        )
    if k_pages.stride() != v_pages.stride():
        raise TidarError("key pages and value pages must have the same strides")
    rows = k_new.shape[0]
    if block_table.dim() != 2 or block_table.shape[0] != rows or lengths.shape != (rows,):
        raise TidarError(f"block_table must be ({rows}, n) and lengths ({rows},), not {_shapes(block_table, lengths)}")
    if block_table.dtype != torch.int32 or lengths.dtype != torch.int32:
        raise TidarError("block_table and lengths must be int32")
    if any(t.stride(-1) != 1 for t in (k_new, v_new, k_pages, v_pages, block_table)):
        raise TidarError("the last dimension of keys, values, pages and block_table must be contiguous")


def check_levels(levels: Tensor, rows: int, queries: int, causal: int, alternates: int, pairs: int) -> int:
    """M; `TidarError` unless the queries are causal ones, and alternates and blocks of masks, each with a level."""
    blocks = levels.shape[-1] - alternates
    masks = queries - causal - alternates
    wrong = alternates < 0 or not 0 <= 2 * pairs <= alternates or blocks < min(alternates, 1) or masks < blocks
    if not 1 <= causal <= queries or wrong or (masks % blocks if blocks else masks):
        also = f", {alternates} alternates with {pairs} pairs" if alternates else ""
        raise TidarError(f"{queries} queries are not {causal} causal ones{also} and {blocks} equal blocks of masks")
    if tuple(levels.shape[:-1]) not in ((), (rows,)) or levels.stride(-1) != 1 or levels.is_floating_point():
        raise TidarError(
            "levels must be integers of shape (A + P,) or (B, A + P), contiguous in a row, each in 0 … causal"
        )
    return masks // blocks if blocks else 0


def check_step(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    levels: Tensor,
    causal: int,
    alternates: int,
    pairs: int,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """`TidarError` unless the arguments describe a step."""
    check_pages(k_new, v_new, k_pages, v_pages, block_table, lengths)
    if q.dim() != 4 or q.shape[:2] != k_new.shape[:2] or q.shape[3] != k_new.shape[3] or q.shape[2] % k_new.shape[2]:
        raise TidarError(f"queries must be (B, L, G·Hk, D) for keys {_shapes(k_new)}, not {_shapes(q)}")
    if len({t.dtype for t in (q, k_new, v_new, k_pages, v_pages)}) > 1:
        raise TidarError("queries, keys, values and pages must have one dtype")
    check_levels(levels, q.shape[0], q.shape[1], causal, alternates, pairs)
    if any(bound is not None and bound <= 0 for bound in (scale, window, softcap)):
        raise TidarError("scale, window and softcap must be above 0: leave them out to do without")
    if sinks is not None and sinks.shape != (q.shape[2],):
        raise TidarError(f"sinks must be ({q.shape[2]},), one a query head, not {_shapes(sinks)}")
    if q.stride(-1) != 1:
        raise TidarError("the last dimension of the queries must be contiguous")


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(t.shape)) for t in tensors)
