"""`tidar.sampling.process` and `sample` as one Triton kernel: logits in, tokens out, nothing stored in between.

The vocabulary is never sorted. What top-k and top-p keep is a prefix of the order by descending score, lower ids first
among equals, and a token's place in it is an integer *key*: the bits of its score above its id. So top-k is the key
below which k tokens lie, found by bisection. Top-p needs no search at all: the best token by score plus noise is the
sample if the tokens before it have less than top_p of the mass; if not, no token from it on is kept, and the best of
those before it is next. Each attempt succeeds with the probability that top-p keeps, so that few are needed:
1 + ln(1 / top_p) on average at most.

A program takes a row, in chunks. A vocabulary of one chunk stays in registers; a larger one is read again for each
pass, from the L2 cache. A row's token depends on its own logits and parameters only, and on the vocabulary's size.

Legend: B rows (requests), R logit rows each, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.greedy import greedy
from tidar.kernels.params import DeviceParams
from tidar.kernels.pdl import THEN, options
from tidar.kernels.sample_kernel import draw
from tidar.kernels.workspace import power_of_2

__all__ = ["sample"]

WHOLE = 8192  # the largest vocabulary that stays in registers
CHUNK = 4096  # tokens taken at a time of a larger one


def chunk_of(vocab: int) -> int:
    """Tokens a program takes at a time: all of them, if they fit in its registers."""
    return max(16, power_of_2(vocab)) if vocab <= WHOLE else CHUNK


def warps(chunk: int) -> int:
    """Warps of a program: 8 tokens a thread, or 16 in the largest chunk, which spills a few registers of sm_90."""
    return min(max(chunk // 256, 1), 16)


def sample(
    logits: Tensor,
    params: DeviceParams,
    lengths: Tensor,
    *,
    first: int,
    suppressed: Tensor | None = None,
    seen: Tensor | None = None,
    drafts: Tensor | None = None,
    others: Tensor | None = None,
    pairs: int = 0,
    sampling: bool,
    filtering: bool,
    bad: Tensor | None = None,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The tokens of `tidar.sampling.sample` after `tidar.sampling.process`, without a wait for the device.

    Row r of request b samples the token at position ``lengths[b] + first + r``. Equal to the two functions token for
    token, except that the sum that top-p cuts off may round differently: it decides otherwise in one row of millions.

    Args:
        logits: (B, R, V) float32, contiguous in V; not modified.
        params: B rows.
        lengths: (B,) int32.
        first: position of row 0 from ``lengths``.
        suppressed: (V,) bool, tokens that are never produced.
        seen: (B, V) bool, contiguous in V, the tokens of the committed text: turns repetition penalties on.
        drafts: (B, at least R - A) int64, contiguous in a row: row r has seen the first r + 1 of them too.
        others: (B, at least A) int64, contiguous in A: the last A rows are alternates behind so many drafts, and have
            seen these (`tidar.kernels.accept.accept`). What they have seen beside decides over drafts only.
        pairs: how many pairs the alternates begin with, of which the second stands a position further.
        sampling: whether any temperature may be above 0.
        filtering: whether any row with a temperature may have top-k or top-p on.
        bad: (1,) int32, set to 1 if a row's logits have a NaN or an infinite maximum, never to 0. The row's token is 0.
        rows: (B, R) int32 contiguous: logits are (N, V), these of their rows are meant.
        out: (B, R) int64 contiguous, where to write; give it where nothing may be allocated.
        chunk: tokens a program takes at a time, a power of 2 of at least 16.

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    told = 0 if others is None else others.shape[1]
    count, places, vocab = check(logits, params, lengths, suppressed, seen, bad, rows)
    out = torch.empty(count, places, dtype=torch.int64, device=logits.device) if out is None else out
    if others is not None and (others.dtype != torch.int64 or len(others) != count or others.stride(1) != 1):
        raise TidarError(f"others must be int64, contiguous in each of {count} rows")
    if not 0 <= 2 * pairs <= told < places:
        raise TidarError(f"{places} rows are not drafts and {told} alternates that begin with {pairs} pairs")
    if drafts is not None and (
        drafts.dtype != torch.int64
        or drafts.shape[0] != count
        or drafts.shape[1] < places - told
        or drafts.stride(1) != 1
    ):
        raise TidarError(
            f"drafts must be int64, at least {places - told} for each of {count} rows, contiguous in a row"
        )
    if out.shape != (count, places) or out.dtype != torch.int64 or not out.is_contiguous():
        raise TidarError(f"out must be contiguous, int64 and {(count, places)}")
    chunk = chunk_of(vocab) if chunk is None else chunk
    if chunk < 16 or power_of_2(chunk) != chunk:
        raise TidarError(f"a chunk must be a power of 2 of at least 16, not {chunk}")
    masked, known = (None if t is None else t.view(torch.uint8) for t in (suppressed, seen))
    if not sampling and vocab > chunk:
        return greedy(logits, rows, params.penalty, masked, known, drafts, others, pairs, out, bad, chunk)
    draw[places, count](
        logits, rows, lengths, *params.tensors, masked, known, drafts, others, out, bad,
        first, logits.stride(0), logits.stride(-2), 0 if seen is None else seen.stride(0),
        0 if drafts is None else drafts.stride(0), 0 if others is None else others.stride(0), PLACES=places - told,
        PAIRS=pairs, VOCAB=vocab, CHUNK=chunk, SAMPLING=sampling, FILTERING=sampling and filtering,
        # A product must be rounded before it is added to, as everywhere else.
        num_warps=warps(chunk), enable_fp_fusion=False, **options(logits.device, when=THEN),
    )  # fmt: skip
    return out


def check(
    logits: Tensor,
    params: DeviceParams,
    lengths: Tensor,
    suppressed: Tensor | None,
    seen: Tensor | None,
    bad: Tensor | None,
    rows: Tensor | None,
) -> tuple[int, int, int]:
    """B, R and V; `TidarError` unless the arguments of `sample` fit together."""
    vocab = logits.shape[-1]
    if rows is not None and (rows.dtype != torch.int32 or rows.dim() != 2 or not rows.is_contiguous()):
        raise TidarError(f"rows must be (B, R) int32 and contiguous, not {tuple(rows.shape)} {rows.dtype}")
    if logits.dim() != (3 if rows is None else 2):
        raise TidarError(f"logits must be (B, R, V), or (N, V) if rows are chosen, not {tuple(logits.shape)}")
    count, places = logits.shape[:2] if rows is None else rows.shape
    if logits.dtype != torch.float32 or logits.stride(-1) != 1:
        raise TidarError(f"logits must be float32 and contiguous in the vocabulary, not {logits.dtype}")
    if any(t.shape != (count,) for t in params.tensors):
        raise TidarError(f"parameters must be those of {count} rows")
    if lengths.shape != (count,) or lengths.dtype != torch.int32:
        raise TidarError(f"lengths must be int32 of shape {(count,)}")
    if suppressed is not None and (suppressed.shape != (vocab,) or suppressed.dtype != torch.bool):
        raise TidarError(f"suppressed must be bool of shape {(vocab,)}")
    if seen is not None and (seen.shape != (count, vocab) or seen.dtype != torch.bool or seen.stride(1) != 1):
        raise TidarError(f"seen must be bool of shape {(count, vocab)}, contiguous in the vocabulary")
    if bad is not None and (bad.numel() != 1 or bad.dtype != torch.int32):
        raise TidarError("bad must be one int32")
    return count, places, vocab
