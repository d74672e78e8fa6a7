"""Weights in one byte a number, with a scale for each row; what a product's kernel and its twin both read.

Weight-only and symmetric: a row of the weight, which makes one feature, is its bytes times one float32. Only the
weight's way from memory gets shorter. Products multiply it in the dtype of the rows, which holds every int8 and every
e4m3 exactly, and scale the sums, so nothing is rounded but the weight itself.

Legend: F features, D depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tidar.errors import TidarError

__all__ = ["Kind", "Quantised", "Weight", "check_kind", "joined", "quantise"]

Kind = Literal["int8", "fp8"]
LIMIT = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Largest number of each, as used."""
DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, eq=False)
class Quantised:
    """A weight (F, D) in one byte a number; as far as shapes and bytes go, it can be asked as a tensor.

    Attributes:
        values: (F, D) int8 or float8_e4m3fn, contiguous.
        scale: (F,) float32, contiguous.

    Raises:
        TidarError: anything else.
    """

    values: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        values, scale = self.values, self.scale
        if values.dtype not in LIMIT or values.dim() != 2 or not values.is_contiguous():
            raise TidarError(f"values must be (F, D) int8 or float8_e4m3fn, not {tuple(values.shape)} {values.dtype}")
        if scale.dtype != torch.float32 or scale.shape != values.shape[:1] or not scale.is_contiguous():
            raise TidarError(f"scale must be ({len(values)},) float32, not {tuple(scale.shape)} {scale.dtype}")

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return int(self.values.nbytes + self.scale.nbytes)

    def __len__(self) -> int:
        return len(self.values)

    def numel(self) -> int:
        return self.values.numel()

    def element_size(self) -> int:
        return 1

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(F, D) as a tensor, its numbers rounded once to ``dtype``."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.values.to(wide) * self.scale.to(wide)[:, None]).to(dtype)

    def __getitem__(self, rows: slice) -> Quantised:
        """A view of some rows."""
        return Quantised(self.values[rows], self.scale[rows])


Weight = Tensor | Quantised


@torch.no_grad()
def quantise(weight: Tensor, kind: Kind) -> Quantised:
    """The nearest weight of ``kind`` to ``weight`` (F, D): each row's largest number becomes the largest there is."""
    dtype = DTYPES[kind]
    limit = LIMIT[dtype]
    wide = weight.detach().float()
    scale = wide.abs().amax(1) / limit
    scale[scale == 0] = 1.0
    shared = (wide / scale[:, None]).clamp_(-limit, limit)
    return Quantised((shared.round_() if kind == "int8" else shared).to(dtype).contiguous(), scale)


def joined(parts: Sequence[Weight]) -> Weight:
    """Weights of the same input as one; all of them are quantised, or none."""
    narrow = [part for part in parts if isinstance(part, Quantised)]
    if not narrow:
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    # No operator joins numbers of 8 bits that are not integers; their bits can be.
    bits = torch.cat([part.values.view(torch.int8) for part in narrow])
    return Quantised(bits.view(narrow[0].values.dtype), torch.cat([part.scale for part in narrow]))


def check_kind(kind: str, device: torch.device) -> Kind:
    """``kind``, for weights on ``device``.

    Raises:
        TidarError: there is no such kind, or the device has no arithmetic for it.
    """
    if kind not in get_args(Kind):
        raise TidarError(f"weights '{kind}' are unknown: use {' or '.join(get_args(Kind))}, or leave it out")
    if kind == "fp8" and device.type != "cuda":
        raise TidarError(f"fp8 weights need an NVIDIA GPU, and the model is for {device.type}: use int8")
    if kind == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        raise TidarError(f"{torch.cuda.get_device_name(device)} has no fp8 (compute capability 8.9 and up): use int8")
    return kind  # type: ignore[return-value]
