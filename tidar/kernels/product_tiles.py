"""How the matrix products of a decoding step are cut up, and the measurement that chooses.

Everything here is decided by static sizes, before a step runs, so that a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tidar.errors import TidarError

__all__ = ["ProductTiles", "candidates", "default_tiles", "graph_time", "tune_product"]

LEAST = 96
"""Programs below which too few of a Hopper GPU's 132 multiprocessors ask for weights to use its memory's bandwidth."""
FLIGHT = 40 * 2**10
"""Bytes of weights that a multiprocessor should have asked for at any time: its bandwidth times a microsecond."""
SHARED = 220 * 2**10
"""Shared memory of a program for its tiles."""


@dataclass(frozen=True)
class ProductTiles:
    """How a product x · weightᵀ is cut up. All are powers of 2.

    Attributes:
        rows: rows of x of a program. 1: multiplied and summed without tensor cores. 16 and 32: the warps share the
            depth, each with sums of its own. From 64 on: Hopper's own matrix instructions, in 16 bits.
        cols: rows of the weight of a program, columns of the product; half of them gates, where there are gates.
        depth: numbers of a row taken at a time; cut to what divides the weight's depth.
        warps: warps of a program.
        stages: depths of the pipeline, one more than tiles in flight.

    Raises:
        TidarError: sizes that cannot be.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        powers = all(n > 0 and n & (n - 1) == 0 for n in (self.rows, self.cols, self.depth, self.warps))
        if not powers or 1 < self.rows < 16 or self.cols < 8 or self.depth < 16 or self.stages < 1:
            raise TidarError(f"tiles must be powers of 2, 1 or at least 16 rows, 8 cols and 16 of depth, not {self}")

    def constants(self, depth: int, features: int, itemsize: int, *, gates: bool) -> dict[str, int]:
        """What the kernel is compiled for, for results of ``features``."""
        taken = min(self.depth, depth & -depth)  # divides the depth, so that the loop needs no mask
        return {
            "D": depth,
            "F": features,
            "GATES": gates,
            "ROWS": self.rows,
            "COLS": self.cols // 2 if gates else self.cols,
            "DEPTH": taken,
            "SLICES": min(self.warps, taken // 16) if 1 < self.rows < 64 and itemsize == 2 else 1,
            "STAGES": self.stages,
        }


def default_tiles(n_rows: int, features: int, depth: int, itemsize: int) -> ProductTiles | None:
    """Tiles without measuring, or None for cuBLAS: a product of (n_rows, depth) and a weight (features, depth).

    Few rows are bound by the weight's way from memory: as many columns a program as leave `LEAST` programs, because
    each reads all of its rows again, from the L2 cache. From 33 rows on these reads weigh more than the weight's, so
    narrow weights, which would need narrow tiles, are left to cuBLAS, which may share out the depth. So are more than
    64 rows, which are bound by arithmetic.

    Args:
        n_rows: rows of x.
        features: rows of the weight, gates included.
        depth: D, columns of the weight.
        itemsize: bytes of a number.
    """
    fit = next((cols for cols in (128, 64, 32, 16) if features // cols >= LEAST), 8)
    if itemsize > 2 and n_rows <= 64:
        return _cut((16, 32, 32, 4), depth, itemsize)
    if n_rows == 1:
        cols = min(fit, 32)
        return _cut((1, cols, min(512, 8192 // cols), 4), depth, itemsize)
    if n_rows <= 32:
        return _cut((16 if n_rows <= 16 else 32, max(16, min(fit, 32)), 256, 4), depth, itemsize)
    if n_rows <= 64 and fit >= 32:
        return _cut((64, fit, 128 if fit == 32 else 64, 4), depth, itemsize)
    return None


def candidates(n_rows: int, features: int, depth: int, itemsize: int) -> Iterator[ProductTiles | None]:
    """Tiles worth trying, the default and cuBLAS first. Arguments as `default_tiles`'."""
    seen = {default_tiles(n_rows, features, depth, itemsize): None, None: None}
    for shape in SHAPES_32 if itemsize > 2 else SHAPES_16:
        least, most = FITTING[shape[0]]
        if least <= n_rows <= most and shape[1] <= features:
            seen |= {_cut(shape, depth, itemsize, flight): None for flight in (FLIGHT, 2 * FLIGHT)}
    yield from seen


FITTING = {1: (1, 4), 16: (1, 64), 32: (17, 128), 64: (33, 1 << 31), 128: (65, 1 << 31)}
"""Numbers of rows for which tiles of so many are tried."""
SHAPES_16 = (
    (1, 8, 512, 4), (1, 16, 256, 4), (1, 16, 512, 4), (1, 16, 512, 8), (1, 32, 256, 4), (1, 32, 256, 8),
    (16, 16, 256, 4), (16, 16, 512, 8), (16, 32, 128, 2), (16, 32, 256, 4), (16, 64, 128, 2), (16, 64, 256, 4),
    (32, 16, 256, 4), (32, 32, 128, 2), (32, 32, 256, 4),
    (64, 32, 128, 4), (64, 64, 64, 4), (64, 64, 128, 4), (64, 128, 64, 4), (64, 128, 64, 8), (64, 256, 64, 8),
    (128, 64, 64, 4), (128, 128, 64, 4), (128, 128, 64, 8), (128, 256, 64, 8),
)  # fmt: skip
SHAPES_32 = ((1, 8, 256, 4), (1, 16, 128, 4), (16, 16, 32, 4), (16, 32, 32, 4), (16, 32, 64, 4))


def _cut(shape: tuple[int, int, int, int], depth: int, itemsize: int, flight: int = FLIGHT) -> ProductTiles:
    """Tiles of rows, columns, depth and warps, with stages for ``flight`` bytes of the weight."""
    rows, cols, taken, warps = shape
    taken = min(taken, depth & -depth)  # the greatest power of 2 that divides the depth
    if rows < 64 and itemsize == 2:
        warps = min(warps, max(1, taken // 64))  # fewer numbers a thread are not loaded ahead
    stages = min(2 - -flight // (cols * taken * itemsize), depth // taken + 1)
    fitting = SHARED // ((rows + cols) * taken * itemsize) + (rows < 64)  # wgmma reads a tile while others arrive
    return ProductTiles(rows, cols, taken, warps, max(2, min(stages, fitting, 8)))


def tune_product(
    runs: Sequence[Callable[[ProductTiles | None], object]],
    candidates: Iterable[ProductTiles | None],
    measure: Callable[[Sequence[Callable[[], object]]], float] | None = None,
) -> ProductTiles | None:
    """The fastest of ``candidates``; for a GPU, and never inside a step.

    Args:
        runs: the product with given tiles, once for each of several weights, best those of a model's layers: together
            they must be too large for the L2 cache, or its bandwidth is measured and not the memory's.
        candidates: what to try; of equals the first wins, and what needs too much shared memory never does.
        measure: time of a sequence of calls; `graph_time` by default.
    """
    from triton.runtime.errors import OutOfResources

    def time(tiles: ProductTiles | None) -> float:
        try:
            return (measure or graph_time)([partial(run, tiles) for run in runs])
        except OutOfResources:
            return float("inf")

    return min(candidates, key=time)


def graph_time(calls: Sequence[Callable[[], object]], count: int = 20) -> float:
    """Milliseconds of a call, from replays of a CUDA graph of ``count`` in turn, so that launching does not count."""
    from triton.testing import do_bench

    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            calls[number % len(calls)]()
    return float(do_bench(graph.replay, warmup=5, rep=20, return_mode="median")) / count
