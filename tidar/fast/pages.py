"""The paged cache: keys and values of all layers in pages that rows take and give back."""

from __future__ import annotations

import torch
from torch import Tensor

from tidar.errors import TidarError

__all__ = ["PAGE", "Pages"]

PAGE = 64
"""Tokens of a page: a tile of keys of `tidar.kernels.step_attention`."""


class Pages:
    """Page 0 belongs to nobody: what rows at rest or behind their end write goes there, and is never read.

    Args:
        layers: of the model.
        count: pages, page 0 not counted.
        heads: key heads.
        width: of a head.

    Attributes:
        keys: (layers, 1 + count, PAGE, heads, width).
        values: likewise.

    Raises:
        TidarError: not enough memory; the message says what would fit.
    """

    def __init__(
        self, layers: int, count: int, heads: int, width: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = layers, 1 + count, PAGE, heads, width
        try:
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        except torch.OutOfMemoryError:
            free = torch.cuda.mem_get_info(device)[0]
            token = 2 * layers * heads * width * dtype.itemsize
            raise TidarError(
                f"no memory for a cache of {count * PAGE} tokens ({count * PAGE * token / 2**30:.1f} GiB): about "
                f"{int(0.9 * free / token)} would fit; use a smaller batch, shorter prompts or fewer new tokens"
            ) from None
        self._free = list(range(count, 0, -1))

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many pages, of those that are free."""
        taken, self._free = self._free[len(self._free) - count :], self._free[: len(self._free) - count]
        return taken

    def give(self, pages: list[int]) -> None:
        """Hand pages back; steps still in flight for their row must have gone before any for their next one."""
        self._free += pages


def pages_for(tokens: int) -> int:
    """Pages that so many tokens fill."""
    return -(-tokens // PAGE)


def table_row(pages: list[int], width: int) -> Tensor:
    """(width,) int32, page 0 behind the row's own."""
    return torch.tensor(pages + [0] * (width - len(pages)), dtype=torch.int32)
