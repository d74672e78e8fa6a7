"""Sampling parameters on the device, at addresses that never change: a captured step sees new values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tidar.config import SamplingParams

__all__ = ["DeviceParams"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceParams:
    """The sampling parameters of B rows on the device, in the precision that `tidar.sampling` computes with.

    Attributes:
        temperature: (B,) float32, 0 where greedy.
        top_k: (B,) int32, 0 where off.
        top_p: (B,) float32, 1 where off.
        penalty: (B,) float32, 1 where off.
        seed: (B,) int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    penalty: Tensor
    seed: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> DeviceParams:
        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        # A temperature that float32 rounds to 0 is not greedy, as in `process`.
        least = torch.finfo(torch.float32).tiny
        return cls(
            temperature=column([max(p.temperature, least) if p.temperature > 0 else 0 for p in params], torch.float32),
            top_k=column([min(p.top_k, 2**31 - 1) for p in params], torch.int32),
            top_p=column([p.top_p for p in params], torch.float32),
            penalty=column([p.repetition_penalty for p in params], torch.float32),
            seed=column([p.seed for p in params], torch.int64),
        )

    def copy_(self, other: DeviceParams) -> None:
        """Take over the values of as many rows, in place."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return tuple(getattr(self, field.name) for field in fields(self))
