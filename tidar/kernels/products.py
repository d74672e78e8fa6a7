"""Matrix products of a decoding step with what stands between them, as Triton kernels.

A step has few rows, so a product is bound by its weight's way from memory, and everything else should ride along: the
norm before it, the residual sum or the gate behind it, the choice of the rows that a head reads. A norm costs no pass
of its own: y = (x·norm) Wᵀ / rms(x), and the sums of squares are formed while the product reads x.

A row's result depends on its tiles, never on other rows or their number: no sum is formed in an order that chance or
the grid decides. `tidar.kernels.reference_products` is the plain twin, `tidar.kernels.product_tiles` chooses tiles,
`tidar.kernels.product_kernel` is the kernel. All are launched while the kernel ahead drains (`tidar.kernels.pdl`), and
those of few rows have asked for their first weights by then.

Without tiles a product is cuBLAS's, with `norm` and `gated` around it; what lies between comes from torch's allocator,
as in any captured graph, and cuBLAS may sum differently for other numbers of rows.

Legend: N rows, D depth of a product, F features.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tidar.errors import TidarError
from tidar.kernels.pdl import begin, options
from tidar.kernels.product_kernel import product
from tidar.kernels.product_tiles import ProductTiles
from tidar.kernels.reference_products import check_product
from tidar.kernels.workspace import power_of_2

__all__ = ["gated", "linear_add", "norm", "norm_gated", "norm_linear"]

FUSED = 64
"""Rows of a tile up to which a norm is part of the product; a larger tile would norm its rows in every column."""
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


@torch.no_grad()
def norm_linear(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    tiles: ProductTiles | None = None,
) -> Tensor:
    """``rmsnorm(x[rows]) · weightᵀ + bias``, summed in float32 and rounded once.

    Args:
        x: (M, D) float32, float16 or bfloat16, rows contiguous; D a multiple of 16. In float16 and tiles of more than
            one row, x · norm must not overflow.
        norm: (D,), weights of an RMS norm, all ones for one without; None for x as it is.
        weight: (F, D) contiguous.
        bias: (F,).
        eps: of the norm, above 0; not read without one.
        rows: (N,) int32 or int64, the rows of x to take, in any order; all by default. Others are not read.
        out: (N, F) of x's dtype or float32, where to write. Made anew in x's dtype without.
        tiles: how to cut it up; None for cuBLAS.

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together, or tiles that do not fit them.
    """
    check_product(x, norm, weight, bias, eps, rows, out, weight.shape[0])
    out = _result(x, rows, weight.shape[0]) if out is None else out
    if tiles is None:
        return _cublas(_rows(x, norm, eps, rows), weight, bias, out)
    return _launch(x, norm, weight, bias, out, eps, rows, tiles)


@torch.no_grad()
def linear_add(
    x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None = None, *, tiles: ProductTiles | None = None
) -> Tensor:
    """``x += a · weightᵀ + bias`` in place, the sum formed in float32 and rounded once (twice by cuBLAS with a bias).

    Args:
        x: (N, F), rows contiguous; of a's dtype, or float32 if there are ``tiles``.
        a: (N, D) float32, float16 or bfloat16, rows contiguous; D a multiple of 16.
        weight: (F, D) contiguous.
        bias: (F,).
        tiles: how to cut it up; None for cuBLAS.

    Returns:
        ``x``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_product(a, None, weight, bias, 0.0, None, x, weight.shape[0])
    if tiles is None:
        return (x if bias is None else x.add_(bias)).addmm_(a, weight.T)
    return _launch(a, None, weight, bias, x, 0.0, None, tiles, add=True)


@torch.no_grad()
def norm_gated(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    out: Tensor | None = None,
    tiles: ProductTiles | None = None,
) -> Tensor:
    """``silu(g) · u`` with ``[g | u] = rmsnorm(x) · weightᵀ + bias``; a program computes gates and ups that match.

    Args:
        x: (N, D), as all others but these `norm_linear`'s.
        weight: (2·F, D) contiguous, all gates before all ups.
        bias: (2·F,).

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_product(x, norm, weight, bias, eps, None, out, weight.shape[0] // 2)
    out = _result(x, None, weight.shape[0] // 2) if out is None else out
    if tiles is None:
        between = _cublas(_rows(x, norm, eps, None), weight, bias, _result(x, None, weight.shape[0]))
        return gated(between, out)
    return _launch(x, norm, weight, bias, out, eps, None, tiles, gates=True)


def norm(x: Tensor, weight: Tensor, *, eps: float, rows: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``rmsnorm(x[rows]) · weight``, (N, D); arguments as `norm_linear`'s, but ``weight`` is the norm's (D,).

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_product(x, weight, None, None, eps, rows, out, x.shape[-1])
    out = _result(x, rows, x.shape[1]) if out is None else out
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
    out = _result(gu, None, features) if out is None else out
    grid = (len(gu), triton.cdiv(features, TAKEN))
    _gated[grid](
        gu, out, gu.stride(0), out.stride(0), F=features, COLS=TAKEN, num_warps=4, **options(gu.device)
    )  # fmt: skip
    return out


def _launch(
    x: Tensor,
    norm: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    rows: Tensor | None,
    tiles: ProductTiles,
    *,
    gates: bool = False,
    add: bool = False,
) -> Tensor:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.shape[1] % 16:
        raise TidarError(f"the kernel has no {x.dtype} of depth {x.shape[1]}: use tidar.kernels.reference_products")
    if tiles.tma or (norm is not None and (tiles.rows > FUSED or tiles.splits > 1)):
        x, norm, rows = _rows(x, norm, eps, rows), None, None
    sizes = tiles.constants(x.shape[1], out.shape[1], x.element_size(), gates=gates)
    grid = (triton.cdiv(len(out), tiles.rows), triton.cdiv(weight.shape[0], tiles.cols), tiles.splits)
    part = arrived = None
    if tiles.splits > 1:
        part = torch.empty(math.prod(grid) * tiles.rows * tiles.cols, dtype=torch.float32, device=x.device)
        arrived = _arrived(x.device)
        if grid[0] * grid[1] > len(arrived):
            raise TidarError(f"{grid[0]} x {grid[1]} tiles are too many to be split: at most {len(arrived)}")
    given = _descriptors(x, weight, sizes) if tiles.tma else (x, weight)
    product[grid](
        given[0], rows, norm, given[1], bias, out, part, arrived, len(out), eps, x.stride(0), out.stride(0),
        ADD=add, num_warps=tiles.warps, num_stages=tiles.stages, **sizes,
        **options(x.device, late=tiles.rows < 64),
    )  # fmt: skip
    return out


def _descriptors(x: Tensor, weight: Tensor, sizes: dict[str, int]) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of x, (N, D), and of the weight, (F, 1, D) or, a gate beside its up, (F, 2, D)."""
    if any(t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16 for t in (x, weight)):
        raise TidarError("such tiles need rows aligned to 16 bytes")
    halves = 2 if sizes["GATES"] else 1
    paired = weight.view(halves, -1, weight.shape[1]).transpose(0, 1)
    block = [sizes["COLS"] // halves, halves, sizes["DEPTH"]]
    return TensorDescriptor.from_tensor(x, [sizes["ROWS"], sizes["DEPTH"]]), TensorDescriptor.from_tensor(paired, block)


@cache
def _arrived(device: torch.device) -> Tensor:
    """Programs that have come to a tile, 0 between launches; used by one launch after another, never by two at once.

    Made by a first call, which also compiles and therefore comes before any capture.
    """
    return torch.zeros(4096, dtype=torch.int32, device=device)


def _rows(x: Tensor, weight: Tensor | None, eps: float, rows: Tensor | None) -> Tensor:
    if weight is not None:
        return norm(x, weight, eps=eps, rows=rows)
    return x if rows is None else x.index_select(0, rows)


def _result(x: Tensor, rows: Tensor | None, features: int) -> Tensor:
    return x.new_empty(len(x if rows is None else rows), features)


def _cublas(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if out.dtype == x.dtype:
        return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
    if x.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), weight.T.to(out.dtype), out=out)
    return out if bias is None else out.add_(bias)
