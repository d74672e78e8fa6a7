"""The drafts of a block, chosen one after another in one launch, as a Triton kernel.

With a `tidar.transition` each draft waits for the one before it, so R drafts are R small products in a row, and what
they cost is launches and reads of the table. Here a grid of programs stays on the GPU for the whole chain, and each
keeps its slice of the table. At each place a program finds the best token of its slice, tells it to the others and
waits for theirs; all of them then know the draft, and nobody has to hand it out.

What is told is one 64-bit word: 32 bits that order as the score, 31 that order the lower token first, and the parity of
the launch. Whatever one program learns from another is in that word, and 64 aligned bits arrive whole, so relaxed
atomics are enough: no other memory has to be seen in any order. Each word has one writer, which writes it once in every
launch; so before a launch all of them have the parity of the launch before, whether it was made directly or by a CUDA
graph. A program reads that parity off a word of its own and takes the other one, and waits until it sees the other one
in the words of all. Nothing is ever cleared.

Waiting for one another is safe only if all programs run at once: the launch is cooperative, so the driver starts all
of them together or refuses. Should a word never come all the same, a program goes on without it after a while.
`tidar.kernels.reference_chain` is the plain twin.

Legend: B rows, R drafts, V vocabulary, W width of the transition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels import noise
from tidar.kernels.reference_chain import check_chain
from tidar.kernels.workspace import power_of_2

__all__ = ["Exchange", "chain"]

LAST = tl.constexpr(2**31 - 1)
LEAST = tl.constexpr(-(2**63))  # below the word of any token, even of score -inf; its parity bit is 0
PATIENCE = tl.constexpr(1 << 14)
"""Looks at the others' words, some milliseconds, before a program goes on without them: a wrong draft is only rejected,
where a wait without end would stop the GPU."""
HELD = 128 * 1024
"""Bytes of the table that a program may hold: of the 227 KiB of shared memory that a multiprocessor has for it."""


@triton.jit
def _word(score, token, parity):
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # -0 is 0
    order = bits ^ ((bits >> 31) & LAST)  # integers that order as floats do
    return (order.to(tl.int64) << 32) | ((token ^ LAST).to(tl.int64) << 1) | parity


@triton.jit
def _ahead(
    base, state, made, temperature, seed, position, row, real, token, held, quad, column, inside, place,
    base_row, base_place, state_row, state_place, made_row, made_place, SAMPLING: tl.constexpr,
):  # fmt: skip
    """What a place needs that does not hang on the token before it: scores so far, state, whether it was made."""
    at = row.to(tl.int64)
    start = base + at * base_row + place * base_place
    score = tl.load(start[:, None] + token[None, :], mask=real[:, None] & held[None, :], other=0.0)
    if SAMPLING:
        # logits / T + noise has its maximum where logits + T · noise has, which also serves T = 0 and overflows never.
        bits = noise.words(seed[:, None], (position + place)[:, None], quad[None, :])
        score += temperature[:, None] * noise.gumbel(bits)
    start = state + at * state_row + place * state_place
    gate = tl.load(start[:, None] + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    return score, gate.to(tl.float32), tl.load(made + at * made_row + place * made_place, mask=real, other=0)


@triton.jit
def _chain(
    base, state, first, made, token_table, mix, suppressed, temperature, seed, lengths, out, words, offset,
    base_row, base_place, state_row, state_place, first_row, made_row, made_place, out_row, out_place,
    BATCH: tl.constexpr, PLACES: tl.constexpr, VOCAB: tl.constexpr, W: tl.constexpr, SAMPLING: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, PROGRAMS: tl.constexpr, SLOTS: tl.constexpr,
) -> None:  # fmt: skip
    program, row = tl.program_id(0), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real, column, slot = row < BATCH, tl.arange(0, WIDTH), tl.arange(0, SLOTS)
    inside = column < W
    token = program * TILE + tl.arange(0, TILE)
    held = token < VOCAB
    quad = program * (TILE // 4) + tl.arange(0, TILE // 4)  # of four tokens, whose noise is made together
    table = tl.load(
        mix + token.to(tl.int64)[:, None] * W + column[None, :], mask=held[:, None] & inside[None, :], other=0.0
    )
    allowed = tl.load(suppressed + token, mask=held, other=1) == 0

    at = row.to(tl.int64)
    before = tl.load(first + at * first_row, mask=real, other=0)
    heat, key, position = 0.0, 0, 0
    if SAMPLING:
        heat = tl.load(temperature + row, mask=real, other=0.0).to(tl.float32)
        key = tl.load(seed + row, mask=real, other=0)
        position = tl.load(lengths + row, mask=real, other=0).to(tl.int64) + offset
    mine = words + row * PROGRAMS + program
    theirs = words + row[:, None] * PROGRAMS + slot[None, :]
    awaited = real[:, None] & (slot < PROGRAMS)[None, :]
    parity = 1 - (tl.load(words + tl.program_id(1) * ROWS * PROGRAMS + program, volatile=True) & 1)

    score, gate, kept = _ahead(
        base, state, made, heat, key, position, row, real, token, held, quad, column, inside, 0,
        base_row, base_place, state_row, state_place, made_row, made_place, SAMPLING,
    )  # fmt: skip
    for place in range(PLACES):
        leaning = tl.load(
            token_table + before[:, None] * W + column[None, :], mask=real[:, None] & inside[None, :], other=0.0
        )
        gate += leaning.to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(table.dtype)
        # A matrix unit takes 16 rows at least. One row is repeated: dearer are sums of products across threads.
        product = tl.dot(tl.broadcast_to(gate, (16, WIDTH)), tl.trans(table), input_precision="ieee")
        if ROWS == 1:
            product = tl.max(product, 0)[None, :]  # of 16 equals
        score += product
        score = tl.where(allowed[None, :], score, float("-inf"))
        best = tl.max(tl.where(held[None, :], _word(score, token[None, :], parity), parity | LEAST), 1)
        tl.atomic_xchg(mine + place * BATCH * PROGRAMS, best, mask=real, sem="relaxed", scope="gpu")

        # The words of the others take a while to come: time for the next place. After the last one, in vain.
        made_here = kept
        score, gate, kept = _ahead(
            base, state, made, heat, key, position, row, real, token, held, quad, column, inside,
            tl.minimum(place + 1, PLACES - 1),
            base_row, base_place, state_row, state_place, made_row, made_place, SAMPLING,
        )  # fmt: skip
        told = tl.load(theirs + place * BATCH * PROGRAMS, mask=awaited, other=parity | LEAST, volatile=True)
        patience = PATIENCE
        while (tl.max((told & 1 ^ parity).to(tl.int32)) != 0) & (patience > 0):
            patience -= 1
            told = tl.load(theirs + place * BATCH * PROGRAMS, mask=awaited, other=parity | LEAST, volatile=True)
        chosen = ((tl.max(told, 1) >> 1) & LAST) ^ LAST
        before = tl.where(made_here != 0, chosen, 0)
        tl.store(out + at * out_row + place * out_place, before, mask=real & (program == 0))


@dataclass(frozen=True, eq=False)
class Exchange:
    """Where the programs of a launch tell each other their best tokens, for one shape; one launch at a time uses it.

    Attributes:
        words: (R, B, programs) int64; before a launch all have the same lowest bit. Never to be written by others.
        rows: rows of the batch that a program serves. Other rows are chains of their own, served by other programs.
        tile: tokens whose rows of the table a program holds; a power of 2.
        warps: of a program; None to have as many as the size of its slice asks for.
    """

    words: Tensor
    rows: int
    tile: int
    warps: int | None = None

    @classmethod
    def for_step(
        cls,
        rows: int,
        places: int,
        vocab: int,
        *,
        programs: int | None = None,
        warps: int | None = None,
        device: torch.device | str,
    ) -> Exchange:
        """Memory for R ``places`` in B ``rows`` over a vocabulary of V.

        Args:
            programs: of the whole launch, at most; 128 by default, and no more than the GPU has multiprocessors.
                Without a GPU, where they run one after another, by default so few that none has to wait.
            warps: a power of 2, to replace the choice of `tidar.kernels.chain.warps`.

        Raises:
            TidarError: sizes below 1, or too few multiprocessors for so many rows.
        """
        device = torch.device(device)
        served = 1 if rows == 1 else 16
        groups = -(-rows // served)
        if programs is None:
            programs = 128 if device.type == "cuda" else max(groups, 1)
        if min(rows, places, vocab, programs) < 1:
            raise TidarError(f"sizes must be at least 1: {rows} rows, {places} drafts, {vocab} tokens, {programs}")
        if device.type == "cuda":
            programs = min(programs, torch.cuda.get_device_properties(device).multi_processor_count)
        if groups > programs:
            raise TidarError(f"{rows} rows are too many for {programs} programs at once: split the batch")
        tile = max(16, power_of_2(-(-vocab // (programs // groups))))
        words = torch.zeros(places, rows, -(-vocab // tile), dtype=torch.int64, device=device)
        return cls(words, served, tile, warps)


def warps(held: int) -> int:
    """Warps of a program that holds so many numbers of the table: 64 a thread."""
    return min(max(held // 2048, 4), 16)


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
    exchange: Exchange | None = None,
) -> Tensor:
    """Drafts d_1 … d_R, each of the logits that its mask and the draft before it give (`tidar.transition`).

    Draft j (from 0) of row b is the token with the highest ``logits + temperature[b] · noise``, the lowest id among
    equals, where ``logits = base[b, j] + mix @ silu(state[b, j] + token_table[before])`` and the noise is that of
    position ``lengths[b] + offset + j`` (`tidar.noise.gumbel`). The gate is rounded to the dtype of ``mix``. Tokens are
    not filtered, as any draft is exact. The head must be linear: one that caps its logits has no ``mix``.

    Args:
        base: (B, R, V) float32, contiguous in V: the head's logits of the masks' hidden states.
        state: (B, R, W) float32, contiguous in W: the transition's view of them, `Transition.state` of the norm.
        first: (B,) int64 in 0 … V - 1, the certain token before the first draft. Not checked: it stays on the device.
        made: (B, R) bool. A draft that nobody made is token 0, and the chain goes on from it.
        token_table: (V, W) float32, float16 or bfloat16, contiguous: the transition's view of each token.
        mix: (V, W) in the dtype of ``token_table``, contiguous: the head's weight times `Transition.out`'s.
        suppressed: (V,) bool, tokens that are never drafted.
        temperature: (B,) floating point; 0 is greedy.
        seed: (B,) int64.
        lengths: (B,) int32.
        offset: of the first draft's position from ``lengths``.
        sampling: whether any temperature may be above 0; without, the three tensors above are not read.
        out: (B, R) int64, any strides, where to write; it may share memory with ``first``, but no element.
        exchange: made for these sizes. Made anew without; give one, and ``out``, where nothing may be allocated.

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together, or a vocabulary whose table does not fit in the programs.
    """
    check_chain(base, state, first, made, token_table, mix, suppressed, temperature, seed, lengths, out)
    rows, places, vocab = base.shape
    width = state.shape[2]
    if base.dtype != torch.float32 or mix.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TidarError(f"the kernel has no {base.dtype} with {mix.dtype}: use tidar.kernels.reference_chain")
    if not all(t.is_contiguous() for t in (token_table, mix, suppressed, temperature, seed, lengths)):
        raise TidarError("tables and sampling parameters must be contiguous")
    if any(t.stride(-1) != 1 for t in (base, state)):
        raise TidarError("logits and states must be contiguous in their last axis")
    if exchange is None:
        exchange = Exchange.for_step(rows, places, vocab, device=base.device)
    words, tile, padded = exchange.words, exchange.tile, max(16, power_of_2(width))
    if words.shape != (places, rows, -(-vocab // tile)) or words.device != base.device:
        raise TidarError(f"the exchange was made for {tuple(words.shape)} on {words.device}: make one for this step")
    if tile * padded * mix.element_size() > HELD:
        raise TidarError(f"{tile} rows of the table are too many for a program: use tidar.kernels.reference_chain")
    out = torch.empty(rows, places, dtype=torch.int64, device=base.device) if out is None else out
    _chain[words.shape[2], triton.cdiv(rows, exchange.rows)](
        base, state, first, made, token_table, mix, suppressed, temperature, seed, lengths, out, words, offset,
        *base.stride()[:2], *state.stride()[:2], *first.stride(), *made.stride(), *out.stride(),
        BATCH=rows, PLACES=places, VOCAB=vocab, W=width, SAMPLING=sampling, ROWS=exchange.rows, TILE=tile,
        WIDTH=padded, PROGRAMS=words.shape[2], SLOTS=power_of_2(words.shape[2]),
        num_warps=exchange.warps or warps(tile * padded), num_stages=1, launch_cooperative_grid=True,
    )  # fmt: skip
    return out
