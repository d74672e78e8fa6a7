"""How `tidar.kernels.hopper` cuts a product up; decided by static sizes, before a step runs."""

from __future__ import annotations

from dataclasses import dataclass

from tidar.errors import TidarError
from tidar.kernels.product_tiles import PROCESSORS, SMALL

__all__ = ["DEPTH", "HopperTiles", "hopper_tiles"]

DEPTH = 64
"""Numbers of a row in a tile."""
SHARED = 224 * 2**10
"""Shared memory of a program for its tiles, of the 227 KiB there are."""
ROOM = {1: PROCESSORS, 2: PROCESSORS, 4: 120}
"""Programs that an H200 runs at a time, by how many make a cluster: its clusters of four leave some multiprocessors
over."""
LEAST = 48
"""Columns of a tile below which the depth is shared out instead: x is read again by every tile."""
MOST, MOST_OF_SMALL = 128, 512
"""Rows up to which, from two on, these products are quicker in a step than others, of large and of small weights
(docs/benchmarks.md)."""
FEW = PROCESSORS // 4
"""Programs of a small product up to which the next kernel starts late."""


@dataclass(frozen=True)
class HopperTiles:
    """A product's tiles.

    Attributes:
        rows: of x, 64 or 128: a warp group multiplies 64.
        cols: rows of the weight, half of them gates where there are gates; a multiple of 16 up to 256.
        splits: programs that share the depth of a tile, 1, 2 or 4; each joins the sums of as many of its rows.
        late: it lets the next kernel start behind its loop, and not at once (`tidar.kernels.pdl`).

    Raises:
        TidarError: sizes that cannot be.
    """

    rows: int
    cols: int
    splits: int = 1
    late: bool = False

    def __post_init__(self) -> None:
        if self.rows not in (64, 128) or self.splits not in ROOM or self.cols % 16 or not 16 <= self.cols <= 256:
            raise TidarError(
                f"tiles have 64 or 128 rows, multiples of 16 up to 256 columns, and 1, 2 or 4 splits, not {self}"
            )
        if self.stages < 2:  # a tile is given back when the next one is there
            raise TidarError(f"tiles of {self} leave no room for a second: take fewer columns or no splits")

    @property
    def groups(self) -> int:
        """Warp groups that multiply."""
        return self.rows // 64

    @property
    def stages(self) -> int:
        """Tiles of the ring."""
        return min(8, (SHARED - 1024 - self.apart) // ((self.rows + self.cols) * 2 * DEPTH))

    @property
    def apart(self) -> int:
        """Bytes of sums that have a place of their own: those of splits, which end at different times."""
        return self.rows * self.pitch * 4 if self.splits > 1 else 0

    @property
    def pitch(self) -> int:
        """Numbers from one row of sums to the next in shared memory: eight more, so that rows meet different banks."""
        return self.cols + 8

    @property
    def shared(self) -> int:
        """Bytes of shared memory: of the ring and of the sums; aligned to 1024."""
        return 1024 + max(self.stages * (self.rows + self.cols) * 2 * DEPTH + self.apart, self.rows * self.pitch * 4)

    def tiles(self, features: int) -> int:
        """Tiles of a weight of so many rows, gates included."""
        return -(-features // self.cols)


def hopper_tiles(n_rows: int, features: int, depth: int, itemsize: int) -> HopperTiles | None:
    """Tiles for a product of (n_rows, depth) and a weight (features, depth), or None where others serve better.

    By what was quickest on one H200, with the weights of models of 17 million to 8 billion parameters.

    Args:
        n_rows: rows of x.
        features: rows of the weight, gates included.
        depth: columns of the weight.
        itemsize: bytes of a number.
    """
    small = features * depth <= SMALL
    if itemsize != 2 or features % 16 or depth % 8 or not 1 < n_rows <= (MOST_OF_SMALL if small else MOST):
        return None
    return (_of_small if small else _of_large)(n_rows, features, depth)


def _of_large(n_rows: int, features: int, depth: int) -> HopperTiles:
    """As few columns a program as give every multiprocessor one, and the depth shared out if they are too few. All rows
    are one tile's, so that a weight is read once."""
    splits = 1
    while splits < max(ROOM) and features * splits < LEAST * PROCESSORS and depth >= 8 * splits * DEPTH:
        splits *= 2
    rows, room = -(-n_rows // 64) * 64, ROOM[splits]
    choices = (HopperTiles(rows, cols, splits) for cols in range(32, 257 if splits == 1 else 193, 16))
    return min(choices, key=lambda t: (-(-t.tiles(features) * splits // room) * t.cols, -t.cols))


def _of_small(n_rows: int, features: int, depth: int) -> HopperTiles:
    """Weights lie in the L2 cache, and what counts is how long a program takes: few columns, all of a ring's tiles
    asked for at once, and a weight that is longer than wide in splits. Of few programs those of the next kernel, were
    they there at once, would gather on few multiprocessors."""
    row_tiles = -(-n_rows // 64)
    splits = 1 if features > depth or depth < 4 * DEPTH else 2 if depth <= 8 * DEPTH else 4
    cols = 32 if row_tiles == 1 or splits == 2 else 64
    while row_tiles * splits * -(-features // cols) > ROOM[splits] and cols < 128:
        cols += 32
    programs = row_tiles * splits * -(-features // cols)
    return HopperTiles(64, cols, splits, late=splits == 1 and programs <= FEW)
