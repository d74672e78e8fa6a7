"""Programmatic dependent launch: a kernel's programs start while the kernel before it drains.

On GPUs of compute capability 9.0 and up a kernel may be launched before the one ahead of it in its stream has finished:
its programs then take their places and ask for their weights, and stand at a barrier until all memory is as they must
find it. What a launch costs is hidden behind the end of the kernel before. CUDA graphs keep this when they capture.

Every kernel launched with `options` calls `begin` first, in all of its programs, those that have nothing to do
included, and before it reads or writes anything that another kernel of the step wrote, writes or reads. Then kernels
see each other's memory as if they had run one after another:

- The barrier holds until the grid before has completed and its writes are visible, not only until it let others start.
- That grid could only complete because its own programs had passed their barriers, so the grid before it had completed
  too; and so on: behind the barrier all earlier kernels are done, and nobody reads any more what is about to be
  overwritten.
- Kernels launched without it, torch's for one, start when all before them have completed; cuBLAS's do, or wait as
  these do. Behind one of them the barrier holds until it has completed, as behind any other.
- No program waits for one that finds no place: the next grid starts when all programs of the one before have started
  or, released late, have nearly finished, and takes what they have left.

When to let the next grid start is a choice of time alone. At once, its programs gather on whichever multiprocessors
have room first, several on one and none on another: where a kernel has few programs and the next one too, that was
measured to cost more than it hides (docs/benchmarks.md). So most kernels of small tiles do so late, by `release` behind
their loop; those of large tiles at once, and others that were quicker so.

A kernel may also run *beside* the one before it (`start`, `finish`), if that one lets it start behind its own barrier
(`THEN`): all earlier kernels are done then, and what these two do, neither reads of the other. It waits at its end
instead of its beginning, so that behind the next barrier both are done.

Otherwise two things are allowed before the barrier. `prefetch` moves lines into the L2 cache, where every write to
them arrives too, and gives no values, so that it is right for any memory that may be read. And weights may be read
(`hopper.cu`): whoever writes them, as training does, waits for the GPU before steps are launched again.

Not for cooperative launches, which place all of their programs at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import triton
import triton.language as tl

__all__ = ["EARLY", "LATE", "THEN", "begin", "finish", "options", "overlapping", "prefetch", "release", "start"]

EARLY, LATE, THEN = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""When a kernel lets the next one start: at once, by `release`, or behind its own barrier; 0 is without overlap."""

_wanted = ContextVar("_wanted", default=True)


@contextmanager
def overlapping(wanted: bool) -> Iterator[None]:
    """Launches inside do so, or follow one another; it is decided at each launch, so at capture."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


@triton.jit
def begin(PDL: tl.constexpr):
    """First call of a kernel: let the next one start, unless late, and wait for the one before."""
    if PDL == EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()
    if PDL == THEN:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def start(PDL: tl.constexpr, BESIDE: tl.constexpr):
    """First call of a kernel that may run BESIDE the one before: `begin`, but without waiting for it.

    It may read what kernels before that one wrote, if that one lets the next start `THEN`, and may write what none of
    the two reads or writes. Reads go past the L1 cache, and `finish` is its last call.
    """
    if BESIDE:
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
    else:
        begin(PDL)


@triton.jit
def finish(PDL: tl.constexpr, BESIDE: tl.constexpr):
    """Last call of a kernel that ran BESIDE the one before: wait for it, so that whoever waits for this one has waited
    for both."""
    if BESIDE and PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """Let the next kernel start, if that was to be late. A program that ends without this call does so by ending."""
    if PDL == LATE:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Ask for the 128-byte lines of a block of ``pointers``, to be in the L2 cache when they are read."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


def options(device: torch.device, *, when: tl.constexpr = EARLY) -> dict[str, int]:
    """Keyword arguments of a launch on ``device``: the constant ``PDL`` of the kernel, and ``launch_pdl`` for Triton.

    Both are 0 in Triton's interpreter and on GPUs without it.

    Args:
        when: it lets the next one start; `LATE`, if the kernel calls `release`.
    """
    able = _wanted.get() and device.type == "cuda" and not triton.knobs.runtime.interpret and _able(device)
    return {"PDL": able * when.value, "launch_pdl": able}


@cache
def _able(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 9
