"""What the kernels of `tidar.kernels.products` compute, written plainly; the path taken without a GPU.

Same names, same arguments; any floating dtype, float64 included. Sums are formed in float32 at least and rounded once.

Legend: N rows, D depth of a product, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from tidar.errors import TidarError
from tidar.kernels.quantised import Quantised, Weight

__all__ = [
    "Ready",
    "check_add",
    "check_add_norm",
    "check_product",
    "gated",
    "linear_add",
    "linear_add_norm",
    "norm",
    "norm_gated",
    "norm_linear",
]


class Ready(NamedTuple):
    """What the making of x left for the norm of it.

    Attributes:
        rows: (M, D), x times the norm's weight; with all rows divided by their root mean square if there are no
            ``squares``.
        squares: (C, M) float32 contiguous, sums of squares of x by chunks of its columns.
        weighed: the same of x times the norm's weight, for a second norm of what the first one makes.
    """

    rows: Tensor
    squares: Tensor | None
    weighed: Tensor | None = None


def norm_linear(
    x: Tensor,
    norm: Tensor | None,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    tiles: object = None,
    ready: object = None,
    again: float | None = None,
    behind: int = 0,
) -> Tensor:
    """A product of normalised rows; arguments as `tidar.kernels.products.norm_linear`, tiles and ready are not read."""
    check_product(x, norm, weight, bias, eps, rows, out, weight.shape[0])
    wide = _normed(x, norm, eps, rows)
    made = _linear(wide, weight, bias)
    if again is not None:
        made[:, behind:] = _linear(_normed(wide, torch.ones_like(wide[0]), again, None), weight, bias)[:, behind:]
    return _into(out, made, x)


def linear_add(
    x: Tensor,
    a: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    *,
    into: Tensor | None = None,
    tiles: object = None,
    twice: bool = False,
) -> None:
    """A product added in place; as `tidar.kernels.products.linear_add`, of which norm, tiles and twice are not read."""
    check_add(x, a, weight, bias, norm, into)
    rows = slice(None) if into is None else into.long()
    x[rows] = (x[rows] + _linear(_normed(a, None, 0.0, None), weight, bias)).to(x.dtype)


def linear_add_norm(
    x: Tensor, a: Tensor, weight: Weight, bias: Tensor | None, norm: Tensor | None, *, eps: float
) -> None:
    """A product added in place; arguments as `tidar.kernels.residual.linear_add_norm`, the last two are not read."""
    check_add_norm(x, a, weight, bias, norm, eps)
    linear_add(x, a, weight, bias)


def norm_gated(
    x: Tensor,
    norm: Tensor | None,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    out: Tensor | None = None,
    tiles: object = None,
    ready: object = None,
) -> Tensor:
    """The first half of a gated MLP; arguments as `tidar.kernels.products.norm_gated`, the last two are not read."""
    check_product(x, norm, weight, bias, eps, None, out, weight.shape[0] // 2)
    gate, up = _linear(_normed(x, norm, eps, None), weight, bias).chunk(2, -1)
    return _into(out, silu(gate) * up, x)


def norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    rows: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalised rows; arguments as `tidar.kernels.rowwise.norm`."""
    check_product(x, weight, None, None, eps, rows, out, x.shape[-1])
    return _into(out, _normed(x, weight, eps, rows), x)


def gated(gu: Tensor, out: Tensor | None = None) -> Tensor:
    """Gates applied; arguments as `tidar.kernels.rowwise.gated`."""
    check_product(gu, None, None, None, 0.0, None, out, gu.shape[-1] // 2)
    gate, up = _normed(gu, None, 0.0, None).chunk(2, -1)
    return _into(out, silu(gate) * up, gu)


def _normed(x: Tensor, norm: Tensor | None, eps: float, rows: Tensor | None) -> Tensor:
    wide = (x if rows is None else x[rows.long()]).to(torch.promote_types(x.dtype, torch.float32))
    return wide if norm is None else wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm


def _linear(wide: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    whole = weight.dequantised(wide.dtype) if isinstance(weight, Quantised) else weight.to(wide.dtype)
    product = wide @ whole.T
    return product if bias is None else product + bias


def _into(out: Tensor | None, result: Tensor, like: Tensor) -> Tensor:
    return result.to(like.dtype) if out is None else out.copy_(result)


def check_add(
    x: Tensor, a: Tensor, weight: Weight, bias: Tensor | None, norm: Tensor | None, into: Tensor | None
) -> None:
    """`TidarError` unless the arguments fit together."""
    check_product(a, None, weight, bias, 0.0, None, x if into is None else x[: len(a)], weight.shape[0])
    if into is not None and (
        into.shape != a.shape[:1] or into.dtype not in (torch.int32, torch.int64) or norm is not None
    ):
        raise TidarError(
            f"into must be ({len(a)},) int32 or int64, without a norm, not {tuple(into.shape)} {into.dtype}"
        )


def check_add_norm(x: Tensor, a: Tensor, weight: Weight, bias: Tensor | None, norm: Tensor | None, eps: float) -> None:
    """`TidarError` unless the arguments fit together."""
    check_product(a, None, weight, bias, 0.0, None, x, weight.shape[0])
    if x.dtype != a.dtype:
        raise TidarError(f"both sides of the sum must have one dtype, not {x.dtype} and {a.dtype}")
    if norm is not None:
        check_product(x, norm, None, None, eps, None, None, x.shape[1])


def check_product(
    x: Tensor,
    norm: Tensor | None,
    weight: Weight | None,
    bias: Tensor | None,
    eps: float,
    rows: Tensor | None,
    out: Tensor | None,
    features: int,
) -> None:
    """`TidarError` unless the arguments fit together; ``features`` is the width of the result."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise TidarError(f"x must be (N, D) with contiguous rows, not {tuple(x.shape)} with strides {x.stride()}")
    held = weight.values if isinstance(weight, Quantised) else weight
    if held is not None and (held.dim() != 2 or held.shape[1] != x.shape[1] or not held.is_contiguous()):
        raise TidarError(f"weight must be (F, {x.shape[1]}) and contiguous, not {tuple(held.shape)}")
    if norm is not None and (norm.shape != x.shape[1:] or not eps > 0):
        raise TidarError(f"norm must be ({x.shape[1]},) and eps above 0, not {tuple(norm.shape)} and {eps}")
    if bias is not None and weight is not None and bias.shape != weight.shape[:1]:
        raise TidarError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    if len({t.dtype for t in (x, norm, weight, bias) if isinstance(t, Tensor)}) > 1:
        raise TidarError("rows, norm, weight and bias must have one dtype")
    if rows is not None and (rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64)):
        raise TidarError(f"rows must be (N,) int32 or int64, not {tuple(rows.shape)} {rows.dtype}")
    wanted = (len(x if rows is None else rows), features)
    if out is not None and (out.shape != wanted or out.dtype not in (x.dtype, torch.float32) or out.stride(1) != 1):
        raise TidarError(f"the result must be {wanted} with contiguous rows, {x.dtype} or float32, not "
                         f"{tuple(out.shape)} {out.dtype}")  # fmt: skip
    width = x.shape[1] if weight is None else weight.shape[0]
    if width not in (features, 2 * features):
        raise TidarError(f"gates and ups must be 2·F, not {width}")
