"""Query and key heads as attention wants them: normed where the model does so, and turned by the rotary embedding.

For the kernel that does only this (`tidar.kernels.rotate`) and for the one that attends as well
(`tidar.kernels.attention_kernel`). A head is loaded in halves, as number i of the one is turned with number i of the
other, and stays so in its padding: each half is followed by its own zeros.

Legend: N heads, H head width, WIDTH a power of 2 and at least H.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["columns", "turned"]


@triton.jit
def columns(H: tl.constexpr, WIDTH: tl.constexpr, APART: tl.constexpr = True):
    """(WIDTH,) each: where a head's numbers stand in memory, and which there are; with APART as `turned` has them."""
    column = tl.arange(0, WIDTH)
    if not APART or WIDTH == H:
        return column, column < H
    else:
        upper = column // (WIDTH // 2)
        column -= upper * (WIDTH // 2)
        return column + upper * (H // 2), column < H // 2


@triton.jit
def turned(heads, wanted, norm, eps, cos, sin, position, H: tl.constexpr, WIDTH: tl.constexpr):
    """(N, WIDTH) float32: the heads at pointers ``heads`` (N, 1), as `columns` says; zeros where not ``wanted`` (N, 1).

    ``position``, one or (N, 1), is a row of ``cos`` and ``sin``. The norm, if it has a weight ``norm`` (H,), rounds as
    the model does: before the weight and behind it.
    """
    half: tl.constexpr = H // 2
    column = tl.arange(0, WIDTH // 2)[None, :]
    inside = column < half
    lower = tl.load(heads + column, mask=wanted & inside, other=0.0)
    upper = tl.load(heads + half + column, mask=wanted & inside, other=0.0)
    turn = position.to(tl.int64) * H + column
    c = tl.load(cos + turn, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + turn, mask=inside, other=0.0).to(tl.float32)
    x, y = lower.to(tl.float32), upper.to(tl.float32)
    if norm is not None:
        weight_x = tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        weight_y = tl.load(norm + half + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x + y * y, 1, keep_dims=True) / H + eps)
        x = ((x * scale).to(lower.dtype).to(tl.float32) * weight_x).to(lower.dtype).to(tl.float32)
        y = ((y * scale).to(upper.dtype).to(tl.float32) * weight_y).to(upper.dtype).to(tl.float32)
    # A sum over pairs where two terms would do, as Triton looks for loads behind a matrix product's operand. Through
    # elementwise code it takes the operand's layout back to each of them, and they wait for one another; and finding a
    # join, it reads the prefix's keys in smaller pieces.
    return tl.sum(tl.join(_whole(x * c, y * c), _whole(-y * s, x * s)), 2)


@triton.jit
def _whole(lower, upper):
    return tl.reshape(tl.permute(tl.join(lower, upper), (0, 2, 1)), (lower.shape[0], 2 * lower.shape[1]))
