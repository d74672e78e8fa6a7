"""Sizes of the step kernel's tiles, and the memory that its splits meet in.

Everything here is decided by static sizes, before a step runs, so that a captured CUDA graph stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tidar.errors import TidarError

__all__ = ["Tiles", "Workspace", "fixed_tiles", "own_keys", "power_of_2", "tiles"]

NARROW = 64
"""Width of a head up to which it is narrow."""
FINE, FINE_WIDE = 48, 40
"""Programs of one split up to which tiles have 16 query rows, of narrow heads and of wider ones. For the latter's
larger tiles also those up to which splits leave some multiprocessors over; with more they take all, and some twice."""
SPARING, CROWDED = 5 / 6, 8 / 7
"""Programs with their splits, to a multiprocessor: of so few programs, and of more."""
SHARED = 1.4
"""How much longer programs take when all multiprocessors have two of them."""
TILE, TILE_WIDTH = 870, 4.7
"""Of 16 query rows: clocks of a program for a tile of 64 keys, and for each number of a head's width."""
MEETING, PART = 1700, 0.5
"""Clocks that splits cost at all, and each of them for each number of a head's width: leaving a part, counting it,
reading it back."""
ROUND = 1500
"""Clocks of each further round of loads of parts, of as many numbers as a program has registers for."""
TALL_WIDTH, TALL_PART = 15.5, 0.0033
"""Of more query rows: clocks for a tile for each number of a head's width; and of each split for each number of all
the parts that are left, which have to be written and read."""
MOST_SPLITS = 32
"""Splits of a tile; each makes the code that joins them longer."""


@dataclass(frozen=True)
class Tiles:
    """How a step is cut up.

    Attributes:
        rows: query rows (L·G of them for a key head) of a program; a power of 2, at least 16.
        keys: keys taken at a time; likewise. Best a divisor of the page size, so that a tile lies in one page.
        splits: programs that share a row's keys, at most; each has a tile of them at least.
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

    Few query rows are bound by latency: tiles of 16, and a split for nearly every tile of keys, as long as there are
    multiprocessors for them. More of them take tiles as high as one warpgroup's matrix instructions; up to D = 128 two
    programs fit on a Hopper multiprocessor, and one multiplies while the other weighs. With two stages instead of three
    the compiler would serialise these instructions. float32 must do without tensor cores, in tiles that spill no
    registers.

    The number of splits is the one with the fewest clocks, counted for prefixes of half of ``max_length``: of the tiles
    of keys of a split, and of the parts that are read back. The clocks were fitted to an H200's times of 1 to 256
    queries, D = 64 and 128 (docs/step-kernel.md). Ties go to fewer splits. Of wide heads and many query rows no such
    count came near the times: there are splits for most multiprocessors, and two at least as long as these find place
    side by side.
    """
    lines, wide = queries * query_heads // heads, head_dim > NARROW
    fit = power_of_2(max(lines, 16))
    if itemsize > 2:
        cut, keys, warps, stages = 16, 16, 8, 2
    elif lines <= 16:
        cut, keys, warps, stages = 16, 64, 4 if heads * rows > 4 or head_dim <= 64 else 8, 2
    else:
        fine = -(-lines // 16) * rows * heads <= (FINE_WIDE if wide else FINE)
        cut, keys, stages = 16 if fine else min(fit, 64), 64, 3 if head_dim <= 256 else 2
        warps = 4 if head_dim <= 128 else 8
    programs = -(-lines // cut) * rows * heads
    units = 1 + -(-max_length // (2 * keys))  # own keys take a tile too
    if cut == 16:
        tile, meeting, part = TILE + TILE_WIDTH * head_dim, MEETING, PART * head_dim
    else:
        tile, meeting, part = TALL_WIDTH * head_dim, 0, TALL_PART * programs * cut * head_dim

    def clocks(splits: int) -> float:
        rounds, over = divmod(programs * splits, 2 * processors)
        # A second program on a multiprocessor slows the first one down.
        last = 1 + (SHARED - 1) * max(0, over / processors - 1) if over else 0
        again = ROUND * (splits * cut * head_dim // (128 * 32 * warps)) if wide and lines > 16 else 0
        joined = meeting + splits * part + again if splits > 1 else 0
        return (SHARED * rounds + last) * -(-units // splits) * tile + joined

    most = min(units, MOST_SPLITS)
    if wide and cut > 16:
        places = processors * (SPARING if programs < FINE_WIDE else CROWDED)
        splits = min(most, max(2, int(places / programs))) if programs <= processors else 1
    else:
        splits = min(range(1, most + 1), key=clocks)
    return Tiles(rows=cut, keys=keys, splits=splits, warps=warps, stages=stages)


def fixed_tiles(head_dim: int, itemsize: int) -> Tiles:
    """Tiles for any step, so that a query's sums are formed in one order (`attend` with ``cached``)."""
    if itemsize > 2:
        return Tiles(rows=16, keys=16, splits=8, warps=8, stages=2)
    return Tiles(rows=64, keys=64, splits=8, warps=4 if head_dim <= 128 else 8, stages=3 if head_dim <= 256 else 2)


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


def own_keys(chosen: Tiles, causal: int, block: int, blocks: int, group: int, others: int = 0) -> int:
    """Own keys taken at a time: all that a tile of query rows may see, but no more than of the prefix."""
    queries, split = divmod(chosen.rows, group)
    if split:
        queries = (chosen.rows - 2) // group + 2  # that a tile can touch
    touched = 0
    if block:
        inside = not split and queries % block == 0 and (causal + others) % block == 0  # no block lies in two tiles
        touched = min(blocks, queries // block if inside else (queries - 2) // block + 2)
    return min(chosen.keys, max(16, power_of_2(causal + min(others, queries + 1) + touched * block)))


def joining(chosen: Tiles, lines: int, width: int) -> dict[str, int]:
    """How the last split reads a tile's parts: constants of the kernel, for L·G ``lines`` of a padded ``width``.

    HELD rows of a tile are kept, FEW of them are joined at a time, from FLIGHT splits at once: as many as registers
    hold, so that many loads are under way.
    """
    threads, held = 32 * chosen.warps, min(chosen.rows, power_of_2(lines))
    few = min(held, max(1, 32 * threads // width))
    rounds = -(-chosen.splits * few * width // (128 * threads))
    return {"HELD": held, "FEW": few, "FLIGHT": -(-chosen.splits // rounds)}


@dataclass(frozen=True, eq=False)
class Workspace:
    """Where the splits of one layer's attention leave their parts; layers and steps use it one at a time.

    Attributes:
        shape: (B, L, Hq, Hk, D) that it was made for.
        tiles: how the step is cut up.
        part: (B·Hk, tiles, splits, rows, D) float32, weighted sums of values; empty if there is one split.
        peaks: (B·Hk, tiles, splits, rows) float32, greatest scores, in base 2.
        totals: the same, sums of weights.
        arrived: (B·Hk, tiles) int32, splits that have left their parts: 0 between launches, and only theirs to write.
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
        cuts = -(-lines // chosen.rows)
        kept = (rows * heads, cuts, chosen.splits if chosen.splits > 1 else 0, min(chosen.rows, power_of_2(lines)))
        part, peaks, totals = (
            torch.empty(kept + rest, dtype=torch.float32, device=device) for rest in ((head_dim,), (), ())
        )
        arrived = torch.zeros(rows * heads, cuts, dtype=torch.int32, device=device)
        return cls((rows, queries, query_heads, heads, head_dim), chosen, part, peaks, totals, arrived)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
