"""Autoregressive decoding: one forward, one token. The baseline, on the same cache, kernels and sampler as TiDAR."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tidar import layout
from tidar.config import SamplingParams
from tidar.decode.base import Rows

__all__ = ["ArDecoder"]


class ArDecoder(Rows):
    """One token a forward."""

    _last: Tensor  # (B, 1), the last certain token

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        return self._next(self.open(prompts, params, 0))

    def step(self) -> list[list[int]]:
        plan = layout.causal(self.cache.lengths, device=self.model.device)
        hidden = self.model.hidden(self._last, plan, cache=self.cache)
        self.forwards += 1
        self.cache.commit([1] * len(self.cache.lengths))
        return self._next(hidden)

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self._last = self._last[torch.tensor(rows, device=self._last.device)]

    def _next(self, hidden: Tensor) -> list[list[int]]:
        seen = None if self.seen is None else self.seen[:, None]
        self._last = self.draw(self.model.head(hidden), self.lengths[:, None], seen)
        certain: list[list[int]] = self._last.tolist()
        self.note(certain)
        return certain
