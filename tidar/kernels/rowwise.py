"""What a step does to each row by itself, beside its products: the RMS norm, and the gate of an MLP.

Where a norm can ride along with the products before and behind it, it does (`tidar.kernels.products`); these launches
are for where it cannot. `tidar.kernels.reference_products` is the plain twin.

Legend: N rows, D width, F features.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.pdl import begin, options
from tidar.kernels.reference_products import check_product
from tidar.kernels.workspace import power_of_2

__all__ = ["gated", "norm", "result"]

TAKEN = 1024  # features of a program of _gated


@triton.jit
def _norm(x, rows, weight, out, eps, x_row, out_row, D: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr) -> None:
    begin(PDL)
    at, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    chosen = at if rows is None else tl.load(rows + at).to(tl.int64)
    wide = tl.load(x + chosen * x_row + column, mask=column < D, other=0.0).to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    scaled *= tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(out + at * out_row + column, scaled.to(out.dtype.element_ty), mask=column < D)


@triton.jit
def _gated(gu, out, gu_row, out_row, F: tl.constexpr, COLS: tl.constexpr, PDL: tl.constexpr) -> None:
    begin(PDL)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    gate = tl.load(gu + row * gu_row + column, mask=column < F).to(tl.float32)
    up = tl.load(gu + row * gu_row + F + column, mask=column < F).to(tl.float32)
    tl.store(out + row * out_row + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=column < F)


def norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``rmsnorm(x[rows]) · weight``, (N, D); arguments as `tidar.kernels.products.norm_linear`'s, but
    ``weight`` is the norm's (D,).

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_product(x, weight, None, None, eps, rows, out, x.shape[-1])
    out = result(x, rows, x.shape[1]) if out is None else out
    width = power_of_2(x.shape[1])
    _norm[(len(out),)](
        x, rows, weight, out, eps, x.stride(0), out.stride(0), D=x.shape[1], WIDTH=width,
        num_warps=min(8, max(1, width // 512)), **options(x.device),
    )  # fmt: skip
    return out


def gated(gu: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu(g) · u`` of rows [g | u].

    Args:
        gu: (N, 2·F) float32, float16 or bfloat16, rows contiguous.
        out: (N, F) of the same dtype or float32, where to write. Made anew in the same without.

    Raises:
        TidarError: arguments that do not fit together.
    """
    features = gu.shape[-1] // 2
    check_product(gu, None, None, None, 0.0, None, out, features)
    out = result(gu, None, features) if out is None else out
    grid = (len(gu), triton.cdiv(features, TAKEN))
    _gated[grid](
        gu, out, gu.stride(0), out.stride(0), F=features, COLS=TAKEN, num_warps=4, **options(gu.device)
    )  # fmt: skip
    return out


def result(x: Tensor, rows: Tensor | None, features: int) -> Tensor:
    """Memory for ``features`` of each of x's rows, or of those chosen."""
    return x.new_empty(len(x if rows is None else rows), features)
