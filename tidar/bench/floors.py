"""The least time a step can take: its bytes over the memory's rate, its operations over the matrix units' rate.

Both rates are measured on the GPU at hand, not read from a data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tidar.decode.plan import Shape
from tidar.fast.lean import LeanModel
from tidar.fast.timing import interleaved

__all__ = ["Floor", "Rates", "floor", "rates"]


@dataclass(frozen=True)
class Rates:
    """What a GPU does at best.

    Attributes:
        bandwidth: bytes a second, read and written, of a large copy on the device.
        matmul: floating-point operations a second of a large bf16 product of random matrices.
    """

    bandwidth: float
    matmul: float


@dataclass(frozen=True)
class Floor:
    """Of one step.

    Attributes:
        bytes: weights, prefix, own keys and values, read or written once.
        flops: of the products and the attention, padding not counted.
        seconds: the larger of both over their rates.
        bound: ``memory`` or ``compute``.
    """

    bytes: float
    flops: float
    seconds: float
    bound: str


def rates(device: torch.device) -> Rates:
    """Measured now; takes a second."""
    source = torch.randn(2**29, device=device)  # 2 GiB, far more than any cache
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    copy, product = interleaved([lambda: target.copy_(source), lambda: torch.mm(a, b, out=out)], rounds=9)
    return Rates(2 * source.nbytes / copy, 2 * 8192**3 / product)


def floor(lean: LeanModel, shape: Shape, rows: int, prefix: int, rate: Rates) -> Floor:
    """Of a step of ``rows`` in ``shape`` behind ``prefix`` tokens each.

    The head computes the rows that are read: K drafts, and the M - 1 masks of the chosen proposal.
    """
    core, layers = lean.core, lean.layers
    width, number = lean.embedding.shape[1], lean.embedding.element_size()
    products = [w for layer in layers for w in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    weights, head = sum(w.numel() for w in products), lean.head.numel()
    held = sum(w.nbytes for w in [*products, lean.head])  # quantised ones with their scales
    queries = rows * shape.queries
    read = rows * (shape.drafts + (shape.masks - 1 if shape.proposals else 0))
    token = 2 * len(layers) * lean.kv_heads * lean.head_dim * number
    k, p, m, a = shape
    level = (k + 1) / 2  # whichever are drafted for: the mean
    own = k * level + p * m * (level + m) + p * a * (level + 1)
    attention = 4 * rows * lean.heads * lean.head_dim * len(layers) * (prefix * shape.queries + own)
    moved = held + number * queries * width + token * rows * (prefix + k)
    flops = 2.0 * weights * queries + 2.0 * head * read + attention
    if core.adapters is not None and p:
        pairs = sum(part.numel() for part in core.adapters.parameters())
        moved, flops = moved + number * pairs, flops + 2.0 * pairs * rows * p * m
    by_memory, by_compute = moved / rate.bandwidth, flops / rate.matmul
    bound = "memory" if by_memory >= by_compute else "compute"
    return Floor(moved, flops, max(by_memory, by_compute), bound)
