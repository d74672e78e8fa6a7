"""What the kernel of `tidar.kernels.chain` computes, written plainly; the path taken without a GPU.

Same names, same arguments.

Legend: B rows, R drafts, V vocabulary, W width of the transition.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from tidar.errors import TidarError
from tidar.noise import gumbel

__all__ = ["chain", "check_chain", "score"]


def chain(
    base: Tensor,
    state: Tensor,
    first: Tensor,
    made: Tensor,
    token_table: Tensor,
    mix: Tensor,
    suppressed: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    lengths: Tensor,
    offset: int,
    sampling: bool,
    out: Tensor | None = None,
    exchange: object = None,
) -> Tensor:
    """Drafts d_1 … d_R, each leaning on the one before; arguments as `tidar.kernels.chain.chain`.

    Any floating dtypes, float64 included, in which the sums are then; ``exchange`` is not read.
    """
    check_chain(base, state, first, made, token_table, mix, suppressed, temperature, seed, lengths, out)
    out = torch.empty(base.shape[:2], dtype=torch.int64, device=base.device) if out is None else out
    before = first
    for place in range(base.shape[1]):
        scores = score(base[:, place], state[:, place], before, token_table, mix, suppressed)
        if sampling:
            position = lengths.long()[:, None] + offset + place
            noise = gumbel(seed, position, base.shape[2])[:, 0]
            scores = scores + temperature[:, None].to(scores.dtype) * noise
        before = torch.where(made[:, place].bool(), scores.argmax(-1), 0)
        out[:, place] = before
    return out


def score(base: Tensor, state: Tensor, before: Tensor, token_table: Tensor, mix: Tensor, suppressed: Tensor) -> Tensor:
    """Logits (B, V) of the drafts behind the tokens ``before`` (B,), from a place's (B, V) and (B, W)."""
    wide = base.dtype
    gate = silu(state.to(wide) + token_table[before].to(wide)).to(mix.dtype)
    return (base + gate.to(wide) @ mix.to(wide).T).masked_fill(suppressed, -torch.inf)


def check_chain(
    base: Tensor,
    state: Tensor,
    first: Tensor,
    made: Tensor,
    token_table: Tensor,
    mix: Tensor,
    suppressed: Tensor,
    temperature: Tensor,
    seed: Tensor,
    lengths: Tensor,
    out: Tensor | None,
) -> None:
    """Raise `TidarError` if the arguments of ``chain`` do not fit together."""
    if base.ndim != 3 or state.ndim != 3 or base.shape[:2] != state.shape[:2] or 0 in (*base.shape, state.shape[2]):
        raise TidarError(f"logits and states must be (B, R, V) and (B, R, W), not {base.shape} and {state.shape}")
    (rows, places, vocab), width = base.shape, state.shape[2]
    if token_table.shape != (vocab, width) or mix.shape != (vocab, width) or token_table.dtype != mix.dtype:
        raise TidarError(
            f"the tables must be {(vocab, width)} of one dtype, not {tuple(token_table.shape)} {token_table.dtype} and "
            f"{tuple(mix.shape)} {mix.dtype}"
        )
    if not all(t.is_floating_point() for t in (base, state, mix, temperature)):
        raise TidarError("logits, states, tables and temperatures must be floating point")
    if suppressed.shape != (vocab,) or suppressed.dtype != torch.bool:
        raise TidarError(f"suppressed must be ({vocab},) bool, not {tuple(suppressed.shape)} {suppressed.dtype}")
    if made.shape != (rows, places) or made.dtype not in (torch.bool, torch.int8):
        raise TidarError(f"made must be {(rows, places)} bool, not {tuple(made.shape)} {made.dtype}")
    if temperature.shape != (rows,):
        raise TidarError(f"temperature must be ({rows},), not {tuple(temperature.shape)}")
    for name, values, dtype in (("first", first, torch.int64), ("seed", seed, torch.int64)):
        if values.shape != (rows,) or values.dtype != dtype:
            raise TidarError(f"{name} must be ({rows},) {dtype}, not {tuple(values.shape)} {values.dtype}")
    if lengths.shape != (rows,) or lengths.dtype != torch.int32:
        raise TidarError(f"lengths must be ({rows},) int32, not {tuple(lengths.shape)} {lengths.dtype}")
    if out is not None and (out.shape != (rows, places) or out.dtype != torch.int64):
        raise TidarError(f"out must be {(rows, places)} int64, not {tuple(out.shape)} {out.dtype}")
