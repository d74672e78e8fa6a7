"""How long calls take, several compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

__all__ = ["interleaved"]


def interleaved(
    calls: Sequence[Callable[[], object]], *, rounds: int, repeat: int = 1, gpu: bool = True
) -> list[float]:
    """Median seconds of each call: all of them in turn, so many rounds, so that drift meets all alike.

    Args:
        calls: what to time; each launches work and waits for nothing.
        rounds: times that each is timed, after one round that is not.
        repeat: calls between two looks at the clock; for what takes a few microseconds.
        gpu: they are timed there, else on the host.
    """
    times: list[list[float]] = [[] for _ in calls]
    watch = _on_gpu if gpu else _on_host
    for turn in range(rounds + 1):
        for kept, call in zip(times, calls, strict=True):
            seconds = watch(call, repeat)
            if turn:
                kept.append(seconds / repeat)
    return [median(each) for each in times]


def _on_gpu(call: Callable[[], object], repeat: int) -> float:
    """By the GPU's own clock: what the host takes to launch and to wait is not the step's."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    call()  # the GPU is busy when the watch starts, so that no launch is waited for
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _on_host(call: Callable[[], object], repeat: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    return time.perf_counter() - begin
