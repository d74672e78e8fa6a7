"""The exact KV cache: write speculatively, commit by counting.

Every forward writes its keys and values behind the committed ones, drafts first, masks after them. Committing n
drafts only moves the row's length: the next forward overwrites rejected drafts and all mask entries, so nothing is
copied or evicted and no mask key ever survives (paper, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from tidar.layout import Layout

__all__ = ["SlotCache"]


class SlotCache(Cache):
    """Keys and values of B rows of different lengths, (B, H, capacity, D) a layer, allocated on first use.

    Args:
        rows: B.
        scattered: the rows never write one common run. Saves finding out, for which the host waits for the GPU.

    Attributes:
        lengths: committed tokens of each row.
    """

    def __init__(self, rows: int, *, scattered: bool = False) -> None:
        super().__init__(layers=[])
        self._scattered = scattered
        self.lengths = [0] * rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._slots: Tensor | None = None  # None: all rows write one common run
        self._first = 0
        self._kv_len = 0

    def place(self, layout: Layout) -> None:
        """Choose the slots that the next forward writes, those of ``layout``."""
        self._kv_len = layout.kv_len
        slots = layout.slots
        if self._scattered:
            self._slots = slots
            return
        run = torch.arange(slots.shape[1], device=slots.device)
        self._first = min(self.lengths)
        contiguous = len(set(self.lengths)) == 1 and bool((slots == self._first + run).all())
        self._slots = None if contiguous else slots

    def commit(self, counts: list[int]) -> None:
        """Keep the first ``counts[b]`` of the tokens just written in row b."""
        self.lengths = [length + n for length, n in zip(self.lengths, counts, strict=True)]

    def select(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        self.lengths = [self.lengths[r] for r in rows]
        for store in (self._keys, self._values):
            for i, old in enumerate(store):
                store[i] = old[torch.tensor(rows, device=old.device)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write (B, H, L, D) keys and values of a layer; return its first ``kv_len`` slots."""
        keys = self._write(self._keys, key_states, layer_idx)
        return keys, self._write(self._values, value_states, layer_idx)

    def _write(self, store: list[Tensor], new: Tensor, layer: int) -> Tensor:
        while len(store) <= layer:
            store.append(new.new_zeros(new.shape[0], new.shape[1], 0, new.shape[3]))
        held = store[layer].shape[2]
        if held < self._kv_len:
            # Zeros, not empty memory: a stray NaN times a zero attention weight would still be NaN.
            grown = new.new_zeros(new.shape[0], new.shape[1], max(self._kv_len, 2 * held), new.shape[3])
            grown[:, :, :held] = store[layer]
            store[layer] = grown
        buffer = store[layer]
        if self._slots is None:
            buffer[:, :, self._first : self._first + new.shape[2]] = new
        else:
            row = torch.arange(new.shape[0], device=new.device)[:, None]
            buffer[row, :, self._slots] = new.transpose(1, 2)
        return buffer[:, :, : self._kv_len]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Longest committed row; only asked by models when no position ids are given."""
        return max(self.lengths)
