"""What `tidar.kernels.hopper` runs: CUDA C++, put together for a form of the product, compiled when first wanted.

The compiler is the library that comes with torch for CUDA (NVRTC, through `cuda.bindings`); it takes a fraction of a
second, and no GPU. Nothing here needs Triton.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

import torch

from tidar.errors import TidarError
from tidar.kernels.hopper_tiles import DEPTH, HopperTiles

__all__ = ["able", "compiled", "done", "source"]


@cache
def able(device: torch.device) -> bool:
    """Whether the kernel can run there: on compute capability 9.0, where `cuda.bindings` finds a driver and a compiler
    not newer than that, as beside a torch for CUDA; elsewhere other kernels do the same."""
    if device.type != "cuda" or torch.version.cuda is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        from cuda.bindings import driver, nvrtc

        (no_compiler, major, _), (no_driver, version) = nvrtc.nvrtcVersion(), driver.cuDriverGetVersion()
    except (ImportError, RuntimeError):
        return False
    return not int(no_compiler) and not int(no_driver) and major <= version // 1000


def source(tiles: HopperTiles, **constants: int) -> str:
    """What is compiled: constants, the matrix instruction for so many columns, and the files."""
    # Registers of a thread that brings tiles, and of one that multiplies: with two warp groups of these, all there are.
    few, many = 40, 240 if tiles.groups == 1 else 232
    constants |= {"ROWS": tiles.rows, "COLS": tiles.cols, "SPLITS": tiles.splits, "STAGES": tiles.stages}
    constants |= {"FEW_REGISTERS": few, "MANY_REGISTERS": many, "DEPTH": DEPTH, "PITCH": tiles.pitch}
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


def done(result: tuple[Any, ...], what: str) -> Any:
    """What a call of `cuda.bindings` gave.

    Raises:
        TidarError: it failed.
    """
    error, *given = result
    if int(error):
        raise TidarError(f"{what} failed with {error.name}: decode with fast=False, which does without")
    return given[0] if len(given) == 1 else given


def compiled(text: str, *flags: str) -> tuple[bytes, str]:
    """Code for compute capability 9.0, and what the compiler says.

    Raises:
        TidarError: it refuses.
    """
    from cuda.bindings import nvrtc

    what = "the CUDA compiler"
    program = done(nvrtc.nvrtcCreateProgram(text.encode(), b"hopper.cu", 0, [], []), what)
    given = [flag.encode() for flag in ("--gpu-architecture=sm_90a", "--std=c++17", *flags)]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    log = b" " * done(nvrtc.nvrtcGetProgramLogSize(program), what)
    done(nvrtc.nvrtcGetProgramLog(program, log), what)
    said = log.rstrip(b"\0 ").decode(errors="replace")
    if int(error):
        why = next((line for line in said.splitlines() if "error" in line), error.name)
        raise TidarError(f"the CUDA compiler refuses a product ({why}): decode with fast=False, which does without")
    code = b" " * done(nvrtc.nvrtcGetCUBINSize(program), what)
    done(nvrtc.nvrtcGetCUBIN(program, code), what)
    done(nvrtc.nvrtcDestroyProgram(program), what)
    return code, said
