"""A large product added to the residual stream, with the norm that reads the sum, as two launches.

A product of few hundred rows and few features has too few tiles for all multiprocessors, so its depth has to be shared
out. cuBLAS can do so, but its second pass then only adds the shares up. Here the shares are the slices of a batched
cuBLAS product, left in float32, and the pass that adds them up also adds the residual and norms the sum for the product
behind: a launch and a pass over the rows fewer. `tidar.kernels.reference_products` has the plain twin.

Legend: N rows, D depth of the product, F features, S slices of the depth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidar.kernels.pdl import begin, options
from tidar.kernels.product_tiles import PROCESSORS
from tidar.kernels.products import cublas
from tidar.kernels.quantised import Quantised, Weight
from tidar.kernels.reference_products import Ready, check_add_norm
from tidar.kernels.rowwise import norm as rms_norm
from tidar.kernels.workspace import power_of_2

__all__ = ["linear_add_norm", "slices"]

TILE = 128
"""Rows and columns of a tile of a large product."""
LEAST = 768
"""Depth that a slice has at least; below, filling the pipelines takes longer than the products."""


@triton.jit
def _add_norm(
    x, parts, bias, norm, out, eps, x_row, part_step,
    SLICES: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row."""
    begin(PDL)
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = column < F
    total = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    for number in tl.static_range(SLICES):
        total += tl.load(parts + number * part_step + row * F + column, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    narrow = total.to(x.dtype.element_ty)
    tl.store(x + row * x_row + column, narrow, mask=inside)
    if norm is not None:
        wide = narrow.to(tl.float32)  # as a norm of its own would read it
        wide *= tl.rsqrt(tl.sum(wide * wide, 0) / F + eps)
        wide *= tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * F + column, wide.to(out.dtype.element_ty), mask=inside)


def slices(n_rows: int, features: int, depth: int) -> int:
    """Slices of the depth, a power of 2: as many as fill the multiprocessors of a Hopper GPU and are long enough."""
    fitting = PROCESSORS * TILE**2 / (n_rows * features)
    chosen = 1
    while 2 * chosen <= 1.05 * fitting and depth % (128 * chosen) == 0 and depth >= 2 * chosen * LEAST:
        chosen *= 2
    return chosen


def _share_out(a: Tensor, weight: Tensor, parts: Tensor) -> None:
    """The products of the slices of ``a`` (N, D) and ``weight`` (F, D), into ``parts`` (S, N, F) float32."""
    left = a.view(len(a), len(parts), -1).transpose(0, 1)
    right = weight.view(len(weight), len(parts), -1).permute(1, 2, 0)
    if a.dtype == torch.float32:
        torch.bmm(left, right, out=parts)
    elif a.is_cuda:
        torch.bmm(left, right, out_dtype=torch.float32, out=parts)
    else:
        torch.bmm(left.float(), right.float(), out=parts)


@torch.no_grad()
def linear_add_norm(
    x: Tensor, a: Tensor, weight: Weight, bias: Tensor | None, norm: Tensor | None, *, eps: float
) -> Ready | None:
    """``x += a · weightᵀ + bias`` in place, by cuBLAS, and ``rmsnorm(x) · norm`` of the sum, as x has it.

    Args:
        x: (N, F) float32, float16 or bfloat16, rows contiguous.
        a: (N, D) of the same dtype, rows contiguous.
        weight: (F, D) contiguous, or quantised.
        bias: (F,).
        norm: (F,), weights of the norm; None for none.
        eps: of the norm, above 0; not read without one.

    Returns:
        The normed rows, or None without ``norm``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_add_norm(x, a, weight, bias, norm, eps)
    count, (features, depth) = len(a), weight.shape
    shares = 1 if isinstance(weight, Quantised) else slices(count, features, depth)
    if shares == 1 and isinstance(weight, Tensor):
        (x if bias is None else x.add_(bias)).addmm_(a, weight.T)
        return None if norm is None else Ready(rms_norm(x, norm, eps=eps), None)
    parts = torch.empty(shares, count, features, dtype=torch.float32, device=x.device)
    if isinstance(weight, Quantised):
        cublas(a, weight, None, parts[0])
    else:
        _share_out(a, weight, parts)
    out = None if norm is None else torch.empty(count, features, dtype=x.dtype, device=x.device)
    width = power_of_2(features)
    _add_norm[(count,)](
        x, parts, bias, norm, out, eps, x.stride(0), parts.stride(0), SLICES=shares, F=features, WIDTH=width,
        num_warps=min(8, max(1, width // 512)), **options(x.device),
    )  # fmt: skip
    return None if out is None else Ready(out, None)
