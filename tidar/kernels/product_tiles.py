"""How the matrix products of a decoding step are cut up, and the measurement that chooses.

Everything here is decided by static sizes, before a step runs, so that a captured CUDA graph stays valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tidar.errors import TidarError
from tidar.kernels.workspace import power_of_2

__all__ = ["ProductTiles", "candidates", "default_tiles", "fixed_tiles", "graph_time"]

PROCESSORS = 132
"""Multiprocessors of a Hopper GPU."""
FLIGHT = 40 * 2**10
"""Bytes of weights that a multiprocessor should have asked for at any time: its bandwidth times a microsecond."""
EARLY = 32 * 2**10
"""Bytes of its weight that a program asks for before the kernel ahead has finished."""
SHARED = 220 * 2**10
"""Shared memory of a program for its tiles."""
SMALL = 1 << 21
"""Numbers of a weight of a small model."""
UNTIL = 512
"""Rows up to which a product with a quantised weight is not cuBLAS's."""


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
        splits: programs that share the depth of a tile; any number. The last of them adds their sums up, in their
            order.
        ahead: numbers of each of its weight's rows that a program asks for, into the L2 cache, before the kernel ahead
            has finished; 0 or a power of 2. Nothing where kernels run one after another.
        tma: Hopper's tensor memory accelerator brings the tiles, from rows aligned to 16 bytes, instead of each thread
            its copies; from 64 rows on. Not where rows are chosen.

    Raises:
        TidarError: sizes that cannot be.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    splits: int = 1
    ahead: int = 0
    tma: bool = False

    def __post_init__(self) -> None:
        sizes = (self.rows, self.cols, self.depth, self.warps, self.ahead or 64)
        powers = all(n > 0 and n & (n - 1) == 0 for n in sizes)
        if not powers or 1 < self.rows < 16 or self.cols < 8 or self.depth < 16 or min(self.stages, self.splits) < 1:
            raise TidarError(f"tiles must be powers of 2, 1 or at least 16 rows, 8 cols and 16 of depth, not {self}")
        if 0 < self.ahead < 64 or (self.tma and self.rows < 64):
            raise TidarError(f"at least 64 numbers are asked for ahead, and tma takes at least 64 rows, not {self}")

    def constants(self, depth: int, features: int, itemsize: int, *, gates: bool) -> dict[str, int]:
        """What the kernel is compiled for, for results of ``features``."""
        taken = min(self.depth, depth & -depth)  # divides the depth, so that the loop needs no mask
        return {
            "D": depth,
            "F": features,
            "GATES": gates,
            "ROWS": self.rows,
            "COLS": self.cols,
            "DEPTH": taken,
            "SLICES": min(self.warps, taken // 16) if 1 < self.rows < 64 and itemsize == 2 else 1,
            "STAGES": self.stages,
            "SPLITS": self.splits,
            "TMA": self.tma,
            "AHEAD": self.ahead,
        }


def default_tiles(
    n_rows: int, features: int, depth: int, itemsize: int, *, narrow: bool = False
) -> ProductTiles | None:
    """Tiles without measuring, or None for cuBLAS: a product of (n_rows, depth) and a weight (features, depth).

    The rules behind what was measured fastest on an H200, for models of 17 million to 8 billion parameters:

    One row is bound by the weight's way from memory: small tiles, many a multiprocessor; a short row of the weight is
    asked for at once. Up to 32 rows too, but each program reads all of them again from the L2 cache; few stages and few
    columns, so that several programs share a multiprocessor, and many columns where there are enough for several
    rounds. More rows are bound by arithmetic and left to cuBLAS, which may share out the depth; except for those of a
    small model, where each launch counts.

    Quantised weights follow the same rules, not measured yet, with half the bytes. cuBLAS would have to be given the
    weight in x's dtype, which pays when its rows are many.

    Args:
        n_rows: rows of x.
        features: rows of the weight, gates included.
        depth: D, columns of the weight.
        itemsize: bytes of a number of x.
        narrow: the weight is quantised, a byte a number; else it has x's dtype.
    """
    held = 1 if narrow else itemsize
    if itemsize > 2:
        return _cut((16, 32, 32, 4), depth, itemsize, held) if n_rows <= 64 else None
    if n_rows == 1:
        cols = 16 if features >= 16 * PROCESSORS else 8
        return _cut((1, cols, 512 if depth <= 2048 else 256, 4), depth, itemsize, held)
    if not narrow and features * depth <= SMALL and 16 < n_rows <= 320:
        return _of_small(n_rows, features, depth, itemsize)
    if n_rows <= 32:
        return _of_few(n_rows, features, depth, itemsize, held)
    if narrow:
        return _widened(n_rows, features, depth, itemsize) if n_rows <= UNTIL else None
    if n_rows <= 64 and features > 64 * PROCESSORS:
        return replace(_cut((64, 64, 64, 4), depth, itemsize), stages=4)
    return None


def fixed_tiles(features: int, depth: int, itemsize: int, *, narrow: bool = False) -> ProductTiles:
    """Tiles for any number of rows, so that a row's product is the same bits alone and among others.

    Arguments as `default_tiles`'. Of 64 rows in 16 bits: a single row wastes the matrix units, which wait for the
    weight anyway, and many rows read it again for every 64 of them.
    """
    held = 1 if narrow else itemsize
    if itemsize > 2:
        return _cut((16, 32, 32, 4), depth, itemsize, held)
    return _cut((64, 64, 64, 4) if features >= 64 * PROCESSORS else (64, 32, 128, 4), depth, itemsize, held)


def _of_few(n_rows: int, features: int, depth: int, itemsize: int, held: int) -> ProductTiles | None:
    """For up to 32 rows, bound by the weight's way from memory."""
    rows, needed = 16 if n_rows <= 16 else 32, features / PROCESSORS
    if needed * depth * held <= FLIGHT:  # all of the weight is under way at once: the more programs, the sooner
        return _cut((rows, 16, 256, 4), depth, itemsize, held)
    if needed > 64 and rows == 32:
        return replace(_cut((64, 64, 64, 4), depth, itemsize, held), stages=4)
    if needed > 64:
        tiles = _cut((16, 64, 128, 2), depth, itemsize, held)
        return tiles if needed > 512 else replace(tiles, stages=min(3, tiles.stages), ahead=128)
    if rows == 16:
        tiles = _cut((16, 16, 256, 4), depth, itemsize, held)
        return replace(tiles, stages=min(5, tiles.stages), ahead=128)
    if needed <= 16 and depth >= 4096 and held > 1:
        return None  # few and long: cuBLAS shares the depth out
    shape = (32, 16 if needed <= 16 else 32, 256, 4) if needed <= 32 else (32, 32, 128, 2)
    return _cut(shape, depth, itemsize, held)


def _of_small(n_rows: int, features: int, depth: int, itemsize: int) -> ProductTiles:
    """Of a small model and more than 16 rows, bound by what waits for what: tiles as small as for fewer rows, as long
    as all programs are under way at once; then of Hopper's own instructions, the deeper the fewer trips they save."""
    one = n_rows <= 64  # a tile of such instructions takes all rows
    if -(-n_rows // 16) * -(-features // 16) <= (PROCESSORS if one else 3 * PROCESSORS // 2):
        shape = (16, 16, 512, 2) if 48 < n_rows <= 64 else (16, 16, 256, 4)
        return replace(_cut(shape, depth, itemsize), ahead=128)  # row tiles share what one of them asked for
    if one:
        cols = min(64, max(16, power_of_2(features // 64)))  # some 64 programs, or fewer
        return replace(_cut((64, cols, 128, 4), depth, itemsize), stages=4, tma=cols == 64)
    if features >= 512 and depth >= 256:
        return replace(_cut((64, 64, 128, 4), depth, itemsize), stages=4, tma=True)
    if depth <= 512:
        return replace(_cut((64, 32, 64, 4), depth, itemsize), stages=4)
    return _cut((64, 32, 128, 4), depth, itemsize)


def _widened(n_rows: int, features: int, depth: int, itemsize: int) -> ProductTiles:
    """Of a quantised weight and many rows: a weight is widened anew for each tile of rows, so tiles have many, and what
    multiprocessors are left over share the depth."""
    wide = n_rows > 64 and features >= 128 * PROCESSORS // 2
    tiles = _cut((128, 128, 64, 8) if wide else (64, 64, 128, 4), depth, itemsize, 1)
    fitting = PROCESSORS // (-(-n_rows // tiles.rows) * -(-features // tiles.cols))
    return replace(tiles, splits=max(1, min(8, fitting, depth // (4 * tiles.depth))))


def candidates(
    n_rows: int, features: int, depth: int, itemsize: int, *, narrow: bool = False
) -> Iterator[ProductTiles | None]:
    """Tiles worth trying, the default and cuBLAS first. Arguments as `default_tiles`'."""
    held = 1 if narrow else itemsize
    default = default_tiles(n_rows, features, depth, itemsize, narrow=narrow)
    seen = {default: None, None: None}
    if default and default.ahead:
        seen |= {replace(default, ahead=ahead): None for ahead in (0, max(64, 128 // held, default.ahead // 2))}
    for shape in SHAPES_32 if itemsize > 2 else SHAPES_16:
        least, most = FITTING[shape[0]]
        if least <= n_rows <= most and shape[1] <= features:
            seen |= {_cut(shape, depth, itemsize, held, flight): None for flight in (FLIGHT, 2 * FLIGHT)}
    for shape in SHAPES_TMA if itemsize == 2 and n_rows > 64 else ():
        # Fewer stages, so that two programs find place on a multiprocessor.
        for flight, programs in ((FLIGHT, PROCESSORS), (FLIGHT // 3, 2 * PROCESSORS)):
            tiles = replace(_cut(shape, depth, itemsize, held, flight), tma=not narrow)
            splits = min(8, programs // (-(-n_rows // tiles.rows) * -(-features // tiles.cols)))
            seen[tiles] = None
            if splits > 1 and depth >= 4 * splits * tiles.depth:
                seen[replace(tiles, splits=splits)] = None
    yield from seen


FITTING = {1: (1, 4), 16: (1, 64), 32: (17, 128), 64: (33, 1 << 31)}
"""Numbers of rows for which tiles of so many are tried."""
SHAPES_16 = (
    (1, 8, 512, 4), (1, 16, 256, 4), (1, 16, 512, 4), (1, 16, 512, 8), (1, 32, 256, 4), (1, 32, 256, 8),
    (16, 16, 256, 4), (16, 16, 512, 8), (16, 32, 128, 2), (16, 32, 256, 4), (16, 64, 128, 2), (16, 64, 256, 4),
    (32, 16, 256, 4), (32, 32, 128, 2), (32, 32, 256, 4),
    (64, 32, 128, 4), (64, 64, 64, 4), (64, 128, 64, 4),
)  # fmt: skip
SHAPES_TMA = ((64, 64, 128, 4), (64, 128, 64, 4), (64, 256, 64, 4), (128, 128, 64, 8))
SHAPES_32 = ((1, 8, 256, 4), (1, 16, 128, 4), (16, 16, 32, 4), (16, 32, 32, 4), (16, 32, 64, 4))


def _cut(
    shape: tuple[int, int, int, int], depth: int, itemsize: int, held: int | None = None, flight: int = FLIGHT
) -> ProductTiles:
    """Tiles of rows, columns, depth and warps, with stages for ``flight`` bytes of the weight, ``held`` a number."""
    held = held or itemsize
    rows, cols, taken, warps = shape
    taken = min(taken, depth & -depth)  # the greatest power of 2 that divides the depth
    if rows < 64 and itemsize == 2:
        warps = min(warps, max(1, taken // 64))  # fewer numbers a thread are not loaded ahead
    stages = min(2 - -flight // (cols * taken * held), depth // taken + 1)
    fitting = SHARED // ((rows * itemsize + cols * held) * taken)
    fitting += rows < 64  # wgmma reads a tile while others arrive
    ahead = max(64, 128 // held, power_of_2(min(EARLY // (cols * held), depth))) if rows < 64 else 0
    return ProductTiles(rows, cols, taken, warps, max(2, min(stages, fitting, 8)), ahead=ahead)


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
