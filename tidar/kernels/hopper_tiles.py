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
MOST = 64
"""Rows up to which these products are quicker in a step than cuBLAS's (docs/benchmarks.md)."""


@dataclass(frozen=True)
class HopperTiles:
    """A product's tiles.

    Attributes:
        rows: of x, 64 or 128: a warp group multiplies 64. `hopper_tiles` takes 64 alone.
        cols: rows of the weight, half of them gates where there are gates; a multiple of 16 up to 256.
        splits: programs that share the depth of a tile, 1, 2 or 4; each joins the sums of as many of its rows.

    Raises:
        TidarError: sizes that cannot be.
    """

    rows: int
    cols: int
    splits: int = 1

    def __post_init__(self) -> None:
        if self.rows not in (64, 128) or self.splits not in ROOM or self.cols % 16 or not 16 <= self.cols <= 256:
            raise TidarError(
                f"tiles have 64 or 128 rows, multiples of 16 up to 256 columns, and 1, 2 or 4 splits, not {self}"
            )

    @property
    def groups(self) -> int:
        """Warp groups that multiply."""
        return self.rows // 64

    @property
    def stages(self) -> int:
        """Tiles of the ring."""
        return min(8, (SHARED - 1024) // ((self.rows + self.cols) * 2 * DEPTH))

    @property
    def pitch(self) -> int:
        """Numbers from one row of sums to the next in shared memory: eight more, so that rows meet different banks."""
        return self.cols + 8

    @property
    def shared(self) -> int:
        """Bytes of shared memory: of the ring, and afterwards of the sums; aligned to 1024."""
        return 1024 + max(self.stages * (self.rows + self.cols) * 2 * DEPTH, self.rows * self.pitch * 4)

    def tiles(self, features: int) -> int:
        """Tiles of a weight of so many rows, gates included."""
        return -(-features // self.cols)


def hopper_tiles(n_rows: int, features: int, depth: int, itemsize: int) -> HopperTiles | None:
    """Tiles for a product of (n_rows, depth) and a weight (features, depth), or None where others serve better.

    By what was quickest on one H200, with the weights of models of 1.5 and 8 billion parameters and 64 rows: as few
    columns a program as give every multiprocessor one, and the depth shared out if they are too few.

    Args:
        n_rows: rows of x.
        features: rows of the weight, gates included.
        depth: columns of the weight.
        itemsize: bytes of a number.
    """
    if itemsize != 2 or not 16 < n_rows <= MOST or features * depth <= SMALL or features % 16 or depth % 8:
        return None
    splits = 1
    while splits < max(ROOM) and features * splits < LEAST * PROCESSORS and depth >= 8 * splits * DEPTH:
        splits *= 2
    rows, room = -(-n_rows // 64) * 64, ROOM[splits]
    choices = (HopperTiles(rows, cols, splits) for cols in range(32, 257, 16))
    return min(choices, key=lambda t: (-(-t.tiles(features) * splits // room) * t.cols, -t.cols))
