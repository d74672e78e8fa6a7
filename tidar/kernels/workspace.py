"""Sizes of the step kernel's tiles, and the memory that its splits meet in.

Everything here is decided by static sizes, before a step runs, so that a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tidar.errors import TidarError

__all__ = ["Tiles", "Workspace", "own_keys", "power_of_2", "tiles", "tune"]

COMBINE_COST = 2
"""What writing and joining a split costs, in tiles of keys. A guess by arithmetic, docs/step-kernel.md."""


@dataclass(frozen=True)
class Tiles:
    """How a step is cut up.

    Attributes:
        rows: query rows (L·G of them for a key head) of a program; a power of 2, at least 16.
        keys: keys taken at a time; likewise.
        splits: programs that share a row's prefix.
        warps: warps of a program.
        stages: tiles of keys in flight.
    """

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


def tiles(
    rows: int,
    queries: int,
    query_heads: int,
    heads: int,
    head_dim: int,
    max_length: int,
    *,
    itemsize: int = 2,
    processors: int = 132,
) -> Tiles:
    """Tiles for B ``rows`` of ``queries`` on a GPU with so many streaming multiprocessors.

    In 16 bits and up to D = 128, 128 query rows and 64 keys, FlashAttention-2's choice: with 8 warps the sums of values
    take 64 registers of a thread, and three tiles of keys and values fit beside the queries in shared memory. With
    fewer rows the prefix would be wanted from the L2 cache faster than it gives. Few queries are bound by memory: the
    least tile that holds them, and one more tile of keys in flight. Wider heads and float32 (which must do without
    tensor cores) are cut until the compiler for sm_90 spills no registers.

    The number of splits is the one with the least work on the busiest multiprocessor: rounds of programs, times keys
    of a program and what joining costs. Ties go to fewer splits.
    """
    lines = queries * query_heads // heads
    fit = power_of_2(max(lines, 16))
    if itemsize > 2:
        cut, keys, warps, stages = 16, 16, 8, 2
    elif head_dim > 128:
        cut, keys, warps, stages = min(fit, 64), 32, 4, 2
    elif fit < 128:
        cut, keys, warps, stages = fit, 64, 4, 4
    else:
        cut, keys, warps, stages = 128, 64, 8, 3
    programs = -(-lines // cut) * rows * heads
    prefix = -(-max_length // keys)

    def work(splits: int) -> int:
        rounds = -(-programs * splits // processors)
        return rounds * (-(-prefix // splits) + (COMBINE_COST if splits > 1 else 0))

    splits = min(range(1, min(max(prefix, 1), 128) + 1), key=work)
    return Tiles(rows=cut, keys=keys, splits=splits, warps=warps, stages=stages)


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def own_keys(chosen: Tiles, causal: int, block: int, blocks: int, group: int) -> int:
    """Own keys taken at a time: all that a tile of query rows may see, but no more than of the prefix."""
    queries = (chosen.rows - 2) // group + 2  # that a tile can touch
    touched = min(blocks, (queries - 2) // block + 2) if block else 0
    return min(chosen.keys, max(16, power_of_2(causal + touched * block)))


def joining(chosen: Tiles, lines: int, width: int) -> dict[str, int]:
    """How the last split of a tile reads the parts, for _attend: rows that are real, splits at a time, and stages."""
    threads = 32 * chosen.warps
    few = min(chosen.rows, power_of_2(lines), max(1, 32 * threads // width))
    most = max(1, 160 * threads // (few * width))
    rounds = -(-chosen.splits // most)
    return {"FEW": few, "FLIGHT": -(-chosen.splits // rounds)}


@dataclass(frozen=True, eq=False)
class Workspace:
    """Where the splits of one layer's attention leave their parts; layers and steps use it in turn.

    Attributes:
        shape: (B, L, Hq, Hk, D) that it was made for.
        tiles: how the step is cut up.
        part: (splits, B·Hk, L·G, D) float32, weighted sums of values; empty if there is one split.
        peaks: (splits, B·Hk, L·G) float32, greatest scores, in base 2.
        totals: the same, sums of weights.
        arrived: (tiles, B·Hk) int32, splits that have left their part; 0 between launches, never to be written by others.
    """

    shape: tuple[int, int, int, int, int]
    tiles: Tiles
    part: Tensor
    peaks: Tensor
    totals: Tensor
    arrived: Tensor

    @classmethod
    def for_step(
        cls,
        rows: int,
        queries: int,
        query_heads: int,
        heads: int,
        head_dim: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        chosen: Tiles | None = None,
    ) -> Workspace:
        """Memory for steps of B ``rows`` of ``queries`` behind prefixes of at most ``max_length`` tokens.

        Longer prefixes are still right, only slower. ``chosen`` replaces the choice of `tiles`.
        """
        if query_heads % heads:
            raise TidarError(f"{query_heads} query heads cannot share {heads} key heads evenly")
        if chosen is None:
            sizes = (rows, queries, query_heads, heads, head_dim, max_length)
            chosen = tiles(*sizes, itemsize=dtype.itemsize, processors=_processors(torch.device(device)))
        if any(n < 16 or power_of_2(n) != n for n in (chosen.rows, chosen.keys)) or chosen.splits < 1:
            raise TidarError(f"tiles must be powers of 2 from 16 on, and splits at least 1, not {chosen}")
        lines = queries * query_heads // heads
        kept = (chosen.splits if chosen.splits > 1 else 0, rows * heads, lines)
        part, peaks, totals = (
            torch.empty(kept + rest, dtype=torch.float32, device=device) for rest in ((head_dim,), (), ())
        )
        arrived = torch.zeros(-(-lines // chosen.rows), rows * heads, dtype=torch.int32, device=device)
        return cls((rows, queries, query_heads, heads, head_dim), chosen, part, peaks, totals, arrived)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def tune(
    run: Callable[[Workspace], object],
    workspace: Workspace,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> Workspace:
    """The workspace with the fastest tiles, changed one size at a time; for a GPU, and never inside a step.

    Args:
        run: a call of `tidar.kernels.step_attention.attend` that waits for nothing; give it typical lengths.
        workspace: where to start.
        measure: time of a call; Triton's benchmark with its median by default.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    rows, queries, query_heads, heads, head_dim = workspace.shape

    def time(candidate: Workspace) -> float:
        def call() -> object:
            return run(candidate)

        try:
            return do_bench(call, return_mode="median") if measure is None else measure(call)
        except OutOfResources:
            return float("inf")

    best, least = workspace, time(workspace)
    splits = workspace.tiles.splits
    for name, values in {
        "splits": {max(1, splits // 2), splits + 1, 2 * splits},
        "keys": {32, 64, 128},
        "rows": {16, 32, 64, 128},
        "warps": {4, 8},
        "stages": {2, 3, 4},
    }.items():
        for value in sorted(values - {getattr(best.tiles, name)}):
            candidate = Workspace.for_step(
                rows,
                queries,
                query_heads,
                heads,
                head_dim,
                0,
                dtype=torch.float32,
                device=workspace.part.device,
                chosen=replace(best.tiles, **{name: value}),
            )
            if (taken := time(candidate)) < least:
                best, least = candidate, taken
    return best
