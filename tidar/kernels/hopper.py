"""Products of tens to hundreds of rows on Hopper GPUs, in CUDA C++, with what stands before and behind them.

For the larger models' steps of up to some hundred queries, which are bound by the weight's way from memory: what Triton
cannot say here is a warp group that does nothing but bring tiles, columns in multiples of 16, so that every
multiprocessor gets as many, and splits of the depth that join their sums through each other's shared memory (clusters).
It is what `tidar.kernels.products` does with `HopperTiles`: the same arguments and results, to rounding, and the same
twins. The kernel is `hopper.cu`. It is compiled when it is first wanted, in a fraction of a second, by the compiler
library that comes with torch (NVRTC, through `cuda.bindings`).

A row's result depends on its tiles, never on other rows: sums are formed in one order.

Legend: N rows, D depth of a product, F features of the result.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels.hopper_tiles import DEPTH, HopperTiles
from tidar.kernels.pdl import options
from tidar.kernels.reference_products import Ready

__all__ = ["able", "compiled", "multiply", "source"]

PLAIN, GATED, ADD = range(3)


class Sizes(ctypes.Structure):
    """As in `hopper_parts.cu`."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("count", "features", "steps", "tiles", "chunks", "squares_row", "out_row")),
        ("behind", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("over_depth", "eps", "again")),
    ]


@cache
def able(device: torch.device) -> bool:
    """Whether the kernel runs there: on compute capability 9.0, where `cuda.bindings` finds its libraries, as it does
    beside a torch for CUDA; elsewhere other kernels do the same."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from cuda.bindings import driver, nvrtc

        return int(nvrtc.nvrtcVersion()[0]) == int(driver.cuDriverGetVersion()[0]) == 0
    except (ImportError, RuntimeError):
        return False


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

    Args:
        x: (N, D) float16 or bfloat16, rows contiguous and aligned to 16 bytes; D a multiple of 8.
        weight: (F, D) contiguous, of x's dtype; (2·F, D), all gates before all ups, with ``gates``. F a multiple of 8.
        bias: as many as rows of the weight.
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
    for name, t in (("x", x), ("weight", weight), ("out", out)):
        if t.data_ptr() % 16 or t.stride(0) * t.element_size() % 16 or t.shape[1] % 8:
            raise TidarError(f"{name}'s rows must be multiples of 8 numbers, aligned to 16 bytes: use other tiles")
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        raise TidarError(f"the kernel has no product of {x.dtype} and {weight.dtype}: use other tiles")
    (count, depth), features = x.shape, out.shape[1]
    number = tiles.tiles(weight.shape[0])
    scaled = squared = left = None
    if norm is not None:
        scaled = torch.empty(count, features, dtype=x.dtype, device=x.device)
        squared, *others = torch.empty(1 + twice, number, count, dtype=torch.float32, device=x.device)
        left = others[0] if twice else None
    overlapped = bool(options(x.device)["launch_pdl"])
    constants = {
        "KIND": GATED if gates else ADD if add else PLAIN,
        "WIDE": out.dtype == torch.float32,
        "BIAS": bias is not None,
        "SQUARES": squares is not None,
        "AGAIN": weighed is not None,
        "NORM": norm is not None,
        "TWICE": twice,
        "PDL": overlapped,
        "HALF": x.dtype == torch.float16,
    }
    chunks, squares_row = (0, 0) if squares is None else squares.shape
    sizes = Sizes(
        count, features, -(-depth // DEPTH), number, chunks, squares_row, out.stride(0), behind, 1 / depth, eps, again
    )
    taken = tiles.cols // 2 if gates else tiles.cols
    maps = _map(*_place(x), tiles.rows), _map(*_place(weight), taken)
    tensors = (out, bias, squares, weighed, norm, scaled, squared, left)
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]
    places = [int(m.getPtr()) for m in maps] + [ctypes.addressof(p) for p in (*pointers, sizes)]
    programs = tiles.splits * number
    if not add and tiles.splits == 1:
        programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
    with torch.cuda.device(x.device):
        kernel = _kernel(x.device.index, tiles, tuple(sorted((name, int(on)) for name, on in constants.items())))
        _launch(kernel, tiles, (programs, -(-count // tiles.rows)), places, x.device, overlapped)
    return None if scaled is None else Ready(scaled, squared, left)


def source(tiles: HopperTiles, **constants: int) -> str:
    """What is compiled: constants, the matrix instruction for so many columns, and the files."""
    # Registers of a thread that brings tiles, and of one that multiplies: all there are, shared out in eights.
    few, many = 40, 240 if tiles.groups == 1 else 232
    constants |= {"ROWS": tiles.rows, "COLS": tiles.cols, "SPLITS": tiles.splits, "STAGES": tiles.stages}
    constants |= {"FEW_REGISTERS": few, "MANY_REGISTERS": many}
    held, kind = tiles.cols // 2, "f16" if constants["HALF"] else "bf16"
    registers = ", ".join(f"%{number}" for number in range(held))
    sums = ", ".join(f'"+f"(d[{number}])' for number in range(held))
    instruction = f"wgmma.mma_async.sync.aligned.m64n{tiles.cols}k16.f32.{kind}.{kind}"
    files = resources.files("tidar.kernels")
    return "\n".join(
        [
            *(f"#define {name} {int(value)}" for name, value in constants.items()),
            files.joinpath("hopper_parts.cu").read_text(encoding="utf-8"),
            "// d, a tile of 64 rows, (more ? d : 0) + a · bᵀ.",
            f"__device__ __forceinline__ void multiply(float (&d)[{held}], u64 a, u64 b, int more) {{",
            f'  asm volatile("{{.reg .pred p; setp.ne.b32 p, %{held + 2}, 0; {instruction} '
            f'{{{registers}}}, %{held}, %{held + 1}, p, 1, 1, 0, 0;}}"',
            f'               : {sums} : "l"(a), "l"(b), "r"(more));',
            "}",
            files.joinpath("hopper.cu").read_text(encoding="utf-8"),
        ]
    )


def _done(result: tuple[Any, ...], what: str) -> Any:
    """What a call of `cuda.bindings` gave, if it succeeded."""
    error, *given = result
    if int(error):
        raise TidarError(f"{what}: {error.name}")
    return given[0] if len(given) == 1 else given


def compiled(text: str, *flags: str) -> tuple[bytes, str]:
    """Code for compute capability 9.0, and what the compiler says.

    Raises:
        TidarError: it refuses.
    """
    from cuda.bindings import nvrtc

    what = "the CUDA compiler"
    program = _done(nvrtc.nvrtcCreateProgram(text.encode(), b"hopper.cu", 0, [], []), what)
    given = [flag.encode() for flag in ("--gpu-architecture=sm_90a", "--std=c++17", *flags)]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program), what)
    _done(nvrtc.nvrtcGetProgramLog(program, log), what)
    said = log.rstrip(b"\0 ").decode(errors="replace")
    if int(error):
        raise TidarError(f"the CUDA compiler refuses hopper.cu: {said[:500]}")
    code = b" " * _done(nvrtc.nvrtcGetCUBINSize(program), what)
    _done(nvrtc.nvrtcGetCUBIN(program, code), what)
    _done(nvrtc.nvrtcDestroyProgram(program), what)
    return code, said


@cache
def _kernel(device: int, tiles: HopperTiles, constants: tuple[tuple[str, int], ...]) -> Any:
    """On the current device, whose number is part of the key."""
    from cuda.bindings import driver

    module = _done(driver.cuModuleLoadData(compiled(source(tiles, **dict(constants)))[0]), "loading a kernel")
    kernel = _done(driver.cuModuleGetFunction(module, b"hopper_product"), "loading a kernel")
    shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _done(driver.cuFuncSetAttribute(kernel, shared, tiles.shared), "a kernel's shared memory")
    return kernel


def _place(t: Tensor) -> tuple[int, int, int, int, bool]:
    return t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), t.dtype == torch.float16


@lru_cache(maxsize=4096)
def _map(address: int, rows: int, depth: int, row: int, half: bool, taken: int) -> Any:
    """How the tensor memory accelerator finds tiles of ``taken`` rows; what lies behind the last row reads as 0."""
    from cuda.bindings import driver

    dtypes, wide, narrow = driver.CUtensorMapDataType, driver.cuuint64_t, driver.cuuint32_t
    return _done(
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
    _done(driver.cuLaunchKernelEx(config, kernel, ctypes.addressof(values), 0), "launching a product")
