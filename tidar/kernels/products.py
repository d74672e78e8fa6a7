"""Matrix products of a decoding step with what stands between them, as Triton kernels.

A step has few rows, so a product is bound by its weight's way from memory, and everything else should ride along: the
norm before it, the residual sum or the gate behind it, the choice of the rows that a head reads. A norm costs no pass
of its own: y = (x·norm) Wᵀ / rms(x), and the product before, which makes x, leaves x·norm and the sums of squares
(`Ready`). Where none comes before, as in the first layer, it is a launch.

A row's result depends on its tiles, never on other rows or their number: no sum is formed in an order that chance or
the grid decides. `tidar.kernels.reference_products` is the plain twin, `tidar.kernels.product_tiles` chooses tiles,
`tidar.kernels.product_kernel` is the kernel. All are launched while the kernel ahead drains (`tidar.kernels.pdl`), and
those of few rows have asked for their first weights by then.

`HopperTiles` are for another kernel, of more rows than one: `tidar.kernels.hopper`. Without tiles a product is
cuBLAS's, with launches of `tidar.kernels.rowwise` around it, and sums are formed by
`tidar.kernels.residual`; what lies between comes from torch's allocator, as in any captured graph, and cuBLAS may sum
differently for other numbers of rows.

Weights may be quantised (`tidar.kernels.quantised`); for cuBLAS they are made x's dtype for the while.

Legend: N rows, D depth of a product, F features.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tidar.errors import TidarError
from tidar.kernels import hopper
from tidar.kernels.hopper_tiles import HopperTiles
from tidar.kernels.pdl import EARLY, LATE, options
from tidar.kernels.product_kernel import product
from tidar.kernels.product_tiles import PROCESSORS, SMALL, ProductTiles
from tidar.kernels.quantised import Quantised, Weight
from tidar.kernels.reference_products import Ready, check_add, check_product
from tidar.kernels.rowwise import gated, result
from tidar.kernels.rowwise import norm as rms_norm
from tidar.kernels.workspace import power_of_2

__all__ = ["cublas", "linear_add", "norm_gated", "norm_linear"]


@torch.no_grad()
def norm_linear(
    x: Tensor,
    norm: Tensor | None,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    tiles: ProductTiles | HopperTiles | None = None,
    ready: Ready | None = None,
    again: float | None = None,
    behind: int = 0,
) -> Tensor:
    """``rmsnorm(x[rows]) · weightᵀ + bias``, summed in float32 and rounded once.

    Args:
        x: (M, D) float32, float16 or bfloat16, rows contiguous; D a multiple of 16.
        norm: (D,), weights of an RMS norm, all ones for one without; None for x as it is.
        weight: (F, D) contiguous, or quantised.
        bias: (F,).
        eps: of the norm, above 0; not read without one.
        rows: (N,) int32 or int64, the rows of x to take, in any order; all by default. Others are not read.
        out: (N, F) of x's dtype or float32, where to write. Made anew in x's dtype without.
        tiles: how to cut it up; None for cuBLAS. `HopperTiles` take no ``rows``.
        ready: of this x and norm, by `linear_add`, `norm` or `tidar.kernels.residual.linear_add_norm`; without, the
            norm is a launch of its own.
        again: epsilon of a second norm, without weights, of what the first one makes; none by default.
        behind: the second norm is for features from here on; those before are of the first alone. Above 0 only with
            tiles, and with ``ready`` of a `linear_add` that was told so.

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together, or tiles that do not fit them.
    """
    check_product(x, norm, weight, bias, eps, rows, out, weight.shape[0])
    out = result(x, rows, weight.shape[0]) if out is None else out
    weighed = None if ready is None or tiles is None or again is None else ready.weighed
    apart = again is not None and weighed is None
    if apart and behind > 0:
        raise TidarError("a second norm of some features needs what linear_add leaves with twice=True, and tiles")
    x, squares, rows = _prepared(x, norm, eps, rows, ready, None if apart else tiles)
    if apart:
        assert again is not None
        x = rms_norm(x, torch.ones_like(x[0]), eps=again)
    if tiles is None:
        return cublas(x, weight, bias, out)
    _launch(x, squares, weight, bias, out, eps, rows, tiles, weighed=weighed, again=again or 0.0, behind=behind)
    return out


@torch.no_grad()
def linear_add(
    x: Tensor,
    a: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    into: Tensor | None = None,
    tiles: ProductTiles | HopperTiles,
    twice: bool = False,
) -> Ready | None:
    """``x += a · weightᵀ + bias`` in place, the sum formed in float32 and rounded once.

    Args:
        x: (N, F), rows contiguous; of a's dtype or float32. With ``into`` as many rows as you like.
        a: (N, D) float32, float16 or bfloat16, rows contiguous; D a multiple of 16.
        weight: (F, D) contiguous, or quantised.
        bias: (F,).
        norm: (F,), weights of the norm that reads x next. In float16, x · norm must not overflow.
        into: (N,) int32 or int64, the rows of x to add to, each at most once, and no norm; all by default.
        tiles: how to cut it up; for cuBLAS there is `tidar.kernels.residual.linear_add_norm`.
        twice: whether what the norm makes may be normed a second time (``again`` of `norm_linear`).

    Returns:
        What that norm needs, or None without ``norm``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_add(x, a, weight, bias, norm, into)
    if norm is None:
        return _launch(a, None, weight, bias, x, 0.0, None, tiles, add=True, into=into)
    if norm.shape != weight.shape[:1] or norm.dtype != a.dtype:
        raise TidarError(f"norm must be ({len(weight)},) {a.dtype}, not {tuple(norm.shape)} {norm.dtype}")
    return _launch(a, None, weight, bias, x, 0.0, None, tiles, add=True, norm=norm, twice=twice)


@torch.no_grad()
def norm_gated(
    x: Tensor,
    norm: Tensor | None,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    out: Tensor | None = None,
    tiles: ProductTiles | HopperTiles | None = None,
    ready: Ready | None = None,
) -> Tensor:
    """``silu(g) · u`` with ``[g | u] = rmsnorm(x) · weightᵀ + bias``; a program computes gates and ups that match.

    Args:
        x: (N, D), as all others but these `norm_linear`'s.
        weight: (2·F, D) contiguous, or quantised, all gates before all ups.
        bias: (2·F,).

    Returns:
        ``out``.

    Raises:
        TidarError: arguments that do not fit together.
    """
    check_product(x, norm, weight, bias, eps, None, out, weight.shape[0] // 2)
    out = result(x, None, weight.shape[0] // 2) if out is None else out
    x, squares, _ = _prepared(x, norm, eps, None, ready, tiles)
    if tiles is None:
        return gated(cublas(x, weight, bias, result(x, None, weight.shape[0])), out)
    _launch(x, squares, weight, bias, out, eps, None, tiles, gates=True)
    return out


def _prepared(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    rows: Tensor | None,
    ready: Ready | None,
    tiles: ProductTiles | HopperTiles | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a product multiplies: rows, the sums of squares to divide them by, and which rows to take."""
    if ready is not None and (ready.squares is None or tiles is not None):
        x, squares = ready.rows, ready.squares
    elif norm is not None:
        return rms_norm(x, norm, eps=eps, rows=rows), None, None
    else:
        squares = None
    if rows is not None and tiles is None:
        squares = None if squares is None else squares.index_select(1, rows)
        return x.index_select(0, rows), squares, None
    return x, squares, rows


def _launch(
    x: Tensor,
    squares: Tensor | None,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    eps: float,
    rows: Tensor | None,
    tiles: ProductTiles | HopperTiles,
    *,
    gates: bool = False,
    add: bool = False,
    norm: Tensor | None = None,
    twice: bool = False,
    into: Tensor | None = None,
    weighed: Tensor | None = None,
    again: float = 0.0,
    behind: int = 0,
) -> Ready | None:
    if isinstance(tiles, HopperTiles):
        if rows is not None or into is not None or isinstance(weight, Quantised):
            raise TidarError("tiles for Hopper GPUs take all rows and no quantised weights: use others")
        return hopper.multiply(
            x, weight, bias, out, tiles=tiles, gates=gates, add=add, squares=squares, eps=eps, norm=norm, twice=twice,
            weighed=weighed, again=again, behind=behind,
        )  # fmt: skip
    if rows is not None:
        tiles = replace(tiles, tma=False)  # it brings neighbours
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or x.shape[1] % 16:
        raise TidarError(f"the kernel has no {x.dtype} of depth {x.shape[1]}: use tidar.kernels.reference_products")
    sizes = tiles.constants(x.shape[1], out.shape[1], x.element_size(), gates=gates)
    count = len(out if into is None else into)
    grid = (triton.cdiv(count, tiles.rows), triton.cdiv(weight.shape[0], tiles.cols), tiles.splits)
    part = arrived = None
    if tiles.splits > 1:
        part = torch.empty(math.prod(grid) * tiles.rows * tiles.cols, dtype=torch.float32, device=x.device)
        arrived = _arrived(x.device)
        if grid[0] * grid[1] > len(arrived):
            raise TidarError(f"{grid[0]} x {grid[1]} tiles are too many to be split: at most {len(arrived)}")
    held, scale = (weight.values, weight.scale) if isinstance(weight, Quantised) else (weight, None)
    if tiles.tma and scale is not None:
        raise TidarError("the tensor memory accelerator brings no quantised weights: use tiles without tma")
    taken = _descriptors(x, held, sizes) if tiles.tma else (x, held)
    chunks, squares_row = (0, 0) if squares is None else squares.shape
    scaled = squared = left = None
    if norm is not None:
        scaled = torch.empty(out.shape, dtype=x.dtype, device=x.device)
        squared, *others = torch.empty(1 + twice, grid[1], count, dtype=torch.float32, device=x.device)
        left = others[0] if twice else None
    # Late, lest the next kernel's programs gather on whatever is free; but not where a small product takes every
    # multiprocessor for a single short round.
    fills = weight.numel() <= SMALL and PROCESSORS < math.prod(grid) <= 2 * PROCESSORS
    product[grid](
        taken[0], rows, into, squares, weighed, taken[1], scale, bias, out, norm, scaled, squared, left, part, arrived,
        count, eps, again, x.stride(0), squares_row, out.stride(0), BEHIND=behind, ADD=add,
        CHUNKS=chunks, HELD=power_of_2(max(chunks, 1)),
        num_warps=tiles.warps, num_stages=tiles.stages, **sizes,
        **options(x.device, when=LATE if tiles.rows < 64 and not fills else EARLY),
    )  # fmt: skip
    return None if scaled is None else Ready(scaled, squared, left)


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


def cublas(x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor) -> Tensor:
    """``out``, filled with ``x · weightᵀ + bias``; arguments as `norm_linear`'s."""
    if isinstance(weight, Quantised):
        # As the kernel does: by numbers that x's dtype holds, and float32 sums that are scaled.
        sums = torch.empty(out.shape, dtype=torch.float32, device=x.device)
        cublas(x, weight.values.to(x.dtype), None, sums).mul_(weight.scale)
        return out.copy_(sums if bias is None else sums.add_(bias))
    if out.dtype == x.dtype:
        return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
    if x.is_cuda:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    else:
        torch.mm(x.to(out.dtype), weight.T.to(out.dtype), out=out)
    return out if bias is None else out.add_(bias)
