"""Drafts that lean on the one before them, chosen without waiting for one another, as two Triton kernels.

With a `tidar.transition` the logits of a draft hang on the token before it, so R drafts seem to be R small products in
a row. But few tokens have a chance: each place has a shortlist of S tokens, the best by the head's logits alone, and
its draft is one of them (the beam of NART-CRF, Sun et al. 2019). What follows each token of a list within the next one
is computed for all at once: R products of S gates with S tokens, none of which waits for another. Which of these R·S
successors are the drafts is then a walk of R look-ups. The first kernel makes the lists; the second one finds the
successors, and the last of its programs walks.

Which masks draft is known when the drafts are checked, but where a mask stands, and so its noise, before. So in a step
whose logits are all there, `prepare` lists the tokens of all masks beside the check, which needs few multiprocessors.

As any draft is exact, a token that is on no list only costs acceptance. Lists are made by groups, without a sort:
tokens are dealt to G groups in turn, 8 at a time, and each group names its best K. Of up to G·K tokens all are listed.
A group of more than 128 tokens deals them to 128 lanes in turn, and of each lane knows only the best.

How programs meet, and why they see what others left: `tidar.kernels.attention_parts`. `tidar.kernels.reference_chain`
is the plain twin.

Legend: B rows, R drafts, V vocabulary, W width of the transition, G groups of K listed tokens, S = G·K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.chain_kernel import TOKEN, follow, shortlist
from tidar.kernels.pdl import options
from tidar.kernels.reference_chain import DEALT, GROUPS, KEPT, Blocks, check_chain, check_results, lanes
from tidar.kernels.shortlists import Shortlists
from tidar.kernels.workspace import power_of_2
from tidar.proposals import KNOWN

__all__ = ["chain", "prepare"]

TOGETHER = 4  # groups of a program, a warp each
FEW = 4096  # successors that are sought in programs of 16: two programs to a multiprocessor of an H200


def prepare(
    base: Tensor,
    suppressed: Tensor,
    lists: Shortlists,
    blocks: Blocks,
    *,
    temperature: Tensor,
    seed: Tensor,
    lengths: Tensor,
    offset: int,
    sampling: bool,
    beside: bool = False,
) -> None:
    """List the tokens of all masks of a step, before it is known which of them draft.

    Args:
        base: (B, L, V) float32, contiguous in V: the head's logits.
        suppressed, temperature, seed, offset, sampling: as of `chain`.
        lists: of B·L states at least.
        blocks: where the masks stand.
        lengths: (B,) int32, before anything is accepted.
        beside: run beside the kernel launched before this, which lets it start when it has waited for all before it
            (`tidar.kernels.pdl.start`).
    """
    queries, first, stride, levels = blocks
    vocab = base.shape[2]
    shortlist[GROUPS // TOGETHER, queries - first, len(base)](
        base, suppressed, temperature, seed, lengths, levels, lists.tokens, lists.scores, lists.noise, offset,
        *base.stride()[:2], 0 if levels is None else levels.stride(0), STRIDE=stride, FIRST=first, QUERIES=queries,
        BESIDE=beside, VOCAB=vocab, GROUPS=GROUPS, LANES=lanes(vocab), TOGETHER=TOGETHER, KEPT=KEPT, DEALT=DEALT,
        SAMPLING=sampling, num_warps=TOGETHER, **options(base.device),
    )  # fmt: skip


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
    rows: Tensor | None = None,
    given: Tensor | None = None,
    out: Tensor | None = None,
    chances: Tensor | None = None,
    shortlists: Shortlists | None = None,
) -> Tensor:
    """Drafts d_1 … d_R, each of the logits that its mask and the draft before it give (`tidar.transition`).

    Draft j (from 0) of row b is the token of the place's shortlist with the highest ``logits + temperature[b] ·
    noise``, the first on the list among equals, where ``logits = base[b, j] + mix @ silu(state[b, j] +
    token_table[before])`` and the noise is that of position ``lengths[b] + offset + j`` (`tidar.noise.gumbel`). The
    gate is rounded to the dtype of ``mix``. The shortlist is made of ``base[b, j]`` alone, and its tokens are not
    filtered, as any draft is exact. The head must be linear: one that caps its logits has no ``mix``.

    Args:
        base: (B, R, V) float32, contiguous in V: the head's logits of the masks' hidden states.
        state: (B, R, W) float32, contiguous in W: the transition's view of them, `Transition.state` of the norm.
        first: (B,) int64 in 0 … V - 1, the certain token before the first draft. Not checked: it stays on the device.
        made: (B, R) bool. A draft that nobody made is token 0; those behind it are as if it had been made.
        token_table: (V, W) float32, float16 or bfloat16, contiguous: the transition's view of each token.
        mix: (V, W) in the dtype of ``token_table``, contiguous: the head's weight times `Transition.out`'s.
        suppressed: (V,) bool, tokens that are never drafted, unless all are.
        temperature: (B,) floating point; 0 is greedy.
        seed: (B,) int64.
        lengths: (B,) int32.
        offset: of the first draft's position from ``lengths``.
        sampling: whether any temperature may be above 0; without, the three tensors above are not read.
        rows: (B, R) int32 contiguous: base is (N, V) and state (N, W), these of their rows are meant, and
            ``shortlists`` were prepared.
        given: (B,) int32 in 0 … R: as many drafts are known, and stand in ``out``.
        out: (B, R) int64, any strides, where to write; it may share memory with ``first``, but no element.
        chances: (B, R) float32, any strides: gets the probability of each draft by the logits of its shortlist, without
            noise; 0 of one that nobody made, `tidar.proposals.KNOWN` of one that was given.
        shortlists: made for these sizes; ranked ones tell the runners-up afterwards, also of drafts that nobody made.
            Made anew without; give them, and ``out``, where nothing may be allocated.

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_chain(base, state, first, made, token_table, mix, suppressed, temperature, seed, lengths, rows)
    check_results(made, given, out, chances)
    vocab, width = base.shape[-1], state.shape[-1]
    count, places = made.shape
    if base.dtype != torch.float32 or mix.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TidarError(f"the kernel has no {base.dtype} with {mix.dtype}: use tidar.kernels.reference_chain")
    if not all(t.is_contiguous() for t in (token_table, mix, suppressed, temperature, seed, lengths)):
        raise TidarError("tables and sampling parameters must be contiguous")
    if any(t.stride(-1) != 1 for t in (base, state)):
        raise TidarError("logits and states must be contiguous in their last axis")
    if vocab > TOKEN.value:
        raise TidarError(f"the kernel has no vocabularies above {TOKEN.value}: use tidar.kernels.reference_chain")
    if shortlists is None:
        if rows is not None:
            raise TidarError("of chosen rows the shortlists must have been prepared: give them")
        shortlists = Shortlists.for_step(count, places, device=base.device)
    states = count * places if rows is None else len(base)
    made_for, where = shortlists.following.shape[:2], shortlists.tokens.device
    if made_for != (count, places) or len(shortlists.tokens) < states or where != base.device:
        raise TidarError(
            f"the shortlists were made for {tuple(made_for)} of {len(shortlists.tokens)} on {where}: make some for this"
        )
    out = torch.empty(count, places, dtype=torch.int64, device=base.device) if out is None else out
    lists = shortlists.tokens, shortlists.scores, shortlists.noise
    if rows is None:
        noise: dict[str, Any] = {"temperature": temperature, "seed": seed, "lengths": lengths, "sampling": sampling}
        prepare(base, suppressed, shortlists, Blocks(places, 0, places, None), offset=offset, **noise)
    slots = shortlists.tokens.shape[1]
    fixed = sizes(count, places, slots, width, mix.element_size())
    follow[slots // fixed["ROWS"], places, count](
        state, first, made, given, rows, token_table, mix, *lists, shortlists.following,
        shortlists.choices, shortlists.came, shortlists.listed, shortlists.arrived, out, chances, *state.stride()[:2],
        *first.stride(), *made.stride(), *out.stride(), *((0, 0) if chances is None else chances.stride()),
        KNOWN=KNOWN, SAMPLING=sampling, **fixed,
        **options(base.device),
    )  # fmt: skip
    return out


def sizes(rows: int, places: int, slots: int, width: int, itemsize: int) -> dict[str, int]:
    """Constants and launch of `follow`: as many rows as a Hopper matrix instruction takes, or registers hold; fewer
    where that makes too few programs for a GPU's multiprocessors."""
    padded = max(16, power_of_2(width))
    few = rows * places * slots <= FEW
    return {
        "PLACES": places,
        "PLACES_UP": power_of_2(places),
        "W": width,
        "WIDTH": padded,
        "DEPTH": min(padded, 64 if itemsize == 2 else 16),
        "SLOTS": slots,
        "ROWS": 16 if few else 64,
        "num_warps": 8 if itemsize > 2 and not few else 4,  # a second warpgroup computes all gates again
        "num_stages": 4,
    }
