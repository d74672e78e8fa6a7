"""Products of two to some hundred rows on Hopper GPUs, in CUDA C++, with what stands before and behind them.

Larger models' steps are bound by the weight's way from memory: what Triton cannot say here is a warp
group that does nothing but bring tiles, columns in multiples of 16, so that every multiprocessor gets as many, and
splits of the depth that join their sums through each other's shared memory (clusters). It is what
`tidar.kernels.products` does with `HopperTiles`: the same arguments and results, to rounding, and the same twins. The
kernel is `hopper.cu`, compiled by `tidar.kernels.hopper_code`.

A row's result depends on its tiles, never on other rows: sums are formed in one order.

Legend: N rows, D depth of a product, F features of the result.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.hopper_code import able, compiled, done, source
from tidar.kernels.hopper_tiles import DEPTH, HopperTiles
from tidar.kernels.pdl import EARLY, LATE, options
from tidar.kernels.reference_products import Ready

__all__ = ["multiply"]

PLAIN, GATED, ADD = range(3)


class Sizes(ctypes.Structure):
    """As in `hopper_parts.cu`."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("count", "features", "steps", "tiles", "chunks", "squares_row", "out_row")),
        *((name, ctypes.c_int) for name in ("behind", "x_bytes")),
        *((name, ctypes.c_float) for name in ("over_depth", "eps", "again")),
    ]


def multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    tiles: HopperTiles,
    gates: bool = False,
    add: bool = False,
    squares: Tensor | None = None,
    eps: float = 0.0,
    norm: Tensor | None = None,
    twice: bool = False,
    weighed: Tensor | None = None,
    again: float = 0.0,
    behind: int = 0,
) -> Ready | None:
    """Fill ``out`` with ``x · weightᵀ + bias``, or add that to it.

    The first call of a form, which compiles, comes before any capture.

    Args:
        x: (N, D) float16 or bfloat16, rows contiguous and aligned to 16 bytes; D a multiple of 8.
        weight: (F, D) contiguous, of x's dtype; (2·F, D), all gates before all ups, with ``gates``. F a multiple of 8.
            It may be read while the kernels ahead still run, so no kernel that does may write it.
        bias: as many as rows of the weight, aligned to 8 bytes, as ``norm``.
        out: (N, F) of x's dtype, or float32, rows contiguous and aligned to 16 bytes.
        tiles: how to cut it up.
        gates: the result is ``silu(gate) · up``.
        add: to what ``out`` holds, which has x's dtype.
        squares: (C, N) float32, by which rows are divided: sums of squares of C chunks of what x is the product of with
            a norm's weights (`Ready`).
        eps: of that norm.
        norm: (F,), weights of the norm that reads the sum next; with ``add``.
        twice: whether what that norm makes may be normed a second time.
        weighed, again, behind: as `tidar.kernels.products.norm_linear`'s.

    Returns:
        With ``norm``, what is left for it.

    Raises:
        TidarError: arguments that the kernel has no form for, or a compiler or driver that refuses.
    """
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype or (add and out.dtype != x.dtype):
        raise TidarError(f"the kernel has no {x.dtype} by {weight.dtype} for {out.dtype}: use other tiles")
    for name, t in (("x", x), ("weight", weight), ("out", out)):
        if t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16 or t.shape[1] % 8:
            raise TidarError(f"{name}'s rows must be multiples of 8 numbers, aligned to 16 bytes: use other tiles")
    if any(t is not None and t.data_ptr() % 8 for t in (bias, norm)) or behind % 4:
        raise TidarError("bias and norm must be aligned to 8 bytes, and behind to 4 columns: use other tiles")
    if x.shape[1] <= DEPTH * (tiles.splits - 1):
        raise TidarError(f"a depth of {x.shape[1]} is too little for {tiles.splits} splits: use other tiles")
    if not able(x.device):
        raise TidarError("the kernel needs a GPU of compute capability 9.0, and cuda.bindings: use other tiles")
    (count, depth), features = x.shape, out.shape[1]
    number = tiles.tiles(weight.shape[0])
    scaled = squared = left = None
    if norm is not None:
        scaled = torch.empty(count, features, dtype=x.dtype, device=x.device)
        squared, *others = torch.empty(1 + twice, number, count, dtype=torch.float32, device=x.device)
        left = others[0] if twice else None
    when = options(x.device, when=LATE if tiles.late else EARLY)["PDL"]
    constants = {
        "KIND": GATED if gates else ADD if add else PLAIN,
        "WIDE": out.dtype == torch.float32,
        "BIAS": bias is not None,
        "SQUARES": squares is not None,
        "AGAIN": weighed is not None,
        "NORM": norm is not None,
        "TWICE": twice,
        "PDL": when,
        "HALF": x.dtype == torch.float16,
    }
    chunks, squares_row = (0, 0) if squares is None else squares.shape
    # No more rows than there are: those that are filled with zeros take longer than those that are read.
    brought, taken = min(count, tiles.rows), tiles.cols // 2 if gates else tiles.cols
    maps = _map(*_place(x), brought), _map(*_place(weight), taken)
    lengths = count, features, -(-depth // DEPTH), number, chunks, squares_row, out.stride(0), behind
    sizes = Sizes(*lengths, 2 * DEPTH * brought, 1 / depth, eps, again)
    tensors = (out, bias, squares, weighed, norm, scaled, squared, left)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    places = [int(m.getPtr()) for m in maps] + [ctypes.addressof(p) for p in (*pointers, sizes)]
    programs = tiles.splits * number
    if not add and tiles.splits == 1:
        programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
    with torch.cuda.device(x.device):
        kernel = _kernel(x.device.index, tiles, tuple(sorted((name, int(on)) for name, on in constants.items())))
        _launch(kernel, tiles, (programs, -(-count // tiles.rows)), places, x.device, bool(when))
    return None if scaled is None else Ready(scaled, squared, left)


@cache
def _kernel(device: int, tiles: HopperTiles, constants: tuple[tuple[str, int], ...]) -> Any:
    """On the current device, whose number is part of the key."""
    from cuda.bindings import driver

    module = done(driver.cuModuleLoadData(compiled(source(tiles, **dict(constants)))[0]), "loading a kernel")
    kernel = done(driver.cuModuleGetFunction(module, b"hopper_product"), "loading a kernel")
    shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    done(driver.cuFuncSetAttribute(kernel, shared, tiles.shared), "a kernel's shared memory")
    return kernel


def _place(t: Tensor) -> tuple[int, int, int, int, bool]:
    return t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), t.dtype == torch.float16


@lru_cache(maxsize=4096)
def _map(address: int, rows: int, depth: int, row: int, half: bool, taken: int) -> Any:
    """How the tensor memory accelerator finds tiles of ``taken`` rows; what lies behind the last row reads as 0."""
    from cuda.bindings import driver

    dtypes, wide, narrow = driver.CUtensorMapDataType, driver.cuuint64_t, driver.cuuint32_t
    return done(
        driver.cuTensorMapEncodeTiled(
            dtypes.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else dtypes.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            2,
            address,
            [wide(depth), wide(rows)],
            [wide(2 * row)],
            [narrow(DEPTH), narrow(taken)],
            [narrow(1), narrow(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "describing a matrix",
    )


def _launch(
    kernel: Any, tiles: HopperTiles, grid: tuple[int, int], places: list[int], device: torch.device, overlapped: bool
) -> None:
    from cuda.bindings import driver

    config, attributes = driver.CUlaunchConfig(), []
    config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = 128 * (tiles.groups + 1), 1, 1
    config.sharedMemBytes, config.hStream = tiles.shared, torch.cuda.current_stream(device).cuda_stream
    if tiles.splits > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = cluster.value.clusterDim
        size.x, size.y, size.z = tiles.splits, 1, 1
        attributes.append(cluster)
    if overlapped:
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        early.value.programmaticStreamSerializationAllowed = 1
        attributes.append(early)
    config.attrs, config.numAttrs = attributes, len(attributes)
    values = (ctypes.c_void_p * len(places))(*places)
    done(driver.cuLaunchKernelEx(config, kernel, ctypes.addressof(values), 0), "launching a product")
