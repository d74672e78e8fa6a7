"""Models whose projections and head are held in one byte a number (`tidar.kernels.quantised`).

The linear layers of a model become `QuantisedLinear`, so transformers' modules run as they are; the fast path fuses
the same weights (`tidar.fast.lean`) and multiplies them by kernels of its own. Embeddings, norms and biases stay in the
model's dtype, and a head that was tied to the embedding gets a copy of its own.

On a CPU each number of a row is taken as three int8, 24 bits, as many as float32 has, so that a product is three of
integers: quick with the instructions that processors have for them, and their sums are exact. Fewer bits would be
quicker still, but then the tiny differences between a token alone and the same token in a block grow to whole steps,
and methods no longer give the same text: with two int8, too, an answer was seen to differ.

Legend: N rows, F features, D depth.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tidar.errors import TidarError
from tidar.kernels.quantised import Kind, Quantised, quantise

__all__ = ["QuantisedLinear", "quantise_model"]

DIGITS = 3
"""Of a row's number in base 256, each from -128 to 127."""
LARGEST = 0x7F7F00
"""Nearly the largest such number: a quotient that rounds up must not turn into the most negative one."""
MIDDLE = 0x808080
"""Added, it makes all digits' bytes positive; then their highest bits are turned, and each byte is a digit."""


class QuantisedLinear(nn.Module):
    """``x · weightᵀ + bias`` with a quantised weight; read only.

    Args:
        weight: (F, D).
        bias: (F,), or None.

    Attributes:
        bias: as given.
    """

    def __init__(self, weight: Quantised, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale)

    @property
    def weight(self) -> Quantised:
        return Quantised(self.get_buffer("values"), self.get_buffer("scale"))

    @weight.setter
    def weight(self, weight: Quantised) -> None:
        self.values, self.scale = weight.values, weight.scale

    @property
    def out_features(self) -> int:
        return len(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(…, F) of ``x`` (…, D), in its dtype."""
        return self.wide(x).to(x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        """(…, F) of ``x`` (…, D), in float32 at least."""
        weight, wide = self.weight, torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        if wide != torch.float32 or x.is_cuda or weight.values.dtype != torch.int8 or not _whole():
            return linear(x.to(wide), weight.dequantised(wide), bias)
        made = _by_digits(x.reshape(-1, x.shape[-1]).float(), weight).view(*x.shape[:-1], -1)
        return made if bias is None else made + bias


def _by_digits(x: Tensor, weight: Quantised) -> Tensor:
    """(N, F) float32 of x (N, D) float32. A row's result depends on that row alone, to the bit."""
    count, depth = x.shape
    step = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1e-30) / LARGEST
    bits = (x / step).round_().int().add_(MIDDLE).bitwise_xor_(MIDDLE)
    digits = bits.view(torch.int8).view(count, depth, 4).permute(2, 0, 1)[:DIGITS]  # the lowest first
    sums = torch._int_mm(digits.reshape(-1, depth), weight.values.T).view(DIGITS, count, -1).float()
    made = sums[2].mul_(256).add_(sums[1]).mul_(256).add_(sums[0])
    return made.mul_(step).mul_(weight.scale)


@cache
def _whole() -> bool:
    """This processor's products of int8 are exact: without instructions of their own some libraries let sums of pairs
    saturate at 16 bits."""
    a = torch.full((4, 64), -128, dtype=torch.int8)
    b = torch.full((32, 64), 127, dtype=torch.int8)
    a[1], a[2:, ::2], b[::2] = 127, 127, -127
    try:
        return torch.equal(torch._int_mm(a, b.T), (a.long() @ b.T.long()).int())
    except RuntimeError:
        return False


@torch.no_grad()
def quantise_model(hf: Any, kind: Kind) -> None:
    """Replace a Hugging Face model's linear layers by quantised ones, one after another, each giving its memory back.

    Raises:
        TidarError: weights outside of linear layers, as those of experts are.
    """
    if any(parameter.dim() > 2 for parameter in hf.parameters()):
        raise TidarError(f"model family '{hf.config.model_type}' has experts, and {kind} weights are for dense ones: "
                         "leave --weights out")  # fmt: skip
    for parent in list(hf.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, nn.Linear):
                setattr(parent, name, QuantisedLinear(quantise(part.weight, kind), part.bias))
