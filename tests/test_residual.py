"""A product added to the residual stream with the norm behind it, against its plain twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kernels import _bfloat16_in_the_interpreter  # noqa: F401
from test_products import DEVICE, agree, exact
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels import reference_products as twin

pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from tidar.kernels import residual, rowwise


def given(rows: int, features: int, depth: int, dtype: torch.dtype, *, bias: bool) -> dict[str, Any]:
    """Rows of x and a that lie apart; what is between is NaN."""
    draw = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype).to(DEVICE)

    x = torch.full((rows, features + 16), torch.nan, dtype=dtype, device=DEVICE)[:, :features].copy_(
        normal(rows, features)
    )
    a = torch.full((rows, depth + 16), torch.nan, dtype=dtype, device=DEVICE)[:, :depth].copy_(normal(rows, depth))
    weight = normal(features, depth) / depth**0.5
    return {
        "x": x,
        "a": a,
        "weight": weight,
        "bias": normal(features) if bias else None,
        "norm": 1 + normal(features) / 4,
        "eps": 1e-2,
    }


def added(case: dict[str, Any]) -> Tensor:
    names = ("x", "a", "weight", "bias", "norm")
    wide: dict[str, Any] = {n: None if case[n] is None else case[n].double() for n in names}
    twin.linear_add_norm(**wide, eps=1e-2)
    x: Tensor = wide["x"]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("features", "depth", "shares"), [(40, 1536, 2), (24, 6144, 8), (48, 1600, 1)])
def test_sum_and_norm(features: int, depth: int, shares: int, dtype: torch.dtype) -> None:
    for rows, bias in ((1, True), (5, False)):
        assert residual.slices(rows, features, depth) == shares
        case = given(rows, features, depth, dtype, bias=bias)
        wanted = added(case)
        ready = residual.linear_add_norm(**case)
        assert agree(case["x"], wanted, dtype)
        # The norm is of the sum as it was rounded, so that both halves of a layer see one residual stream.
        again = {"x": case["x"], "weight": case["norm"], "eps": case["eps"]}
        assert ready is not None and torch.equal(ready.rows, rowwise.norm(**again))
        assert ready is not None and ready.squares is None and agree(ready.rows, exact(twin.norm, again), dtype)


def test_without_a_norm() -> None:
    case = given(3, 40, 1536, torch.float32, bias=True) | {"norm": None}
    wanted = added(case)
    assert residual.linear_add_norm(**case) is None
    assert agree(case["x"], wanted, torch.float32)


@pytest.mark.parametrize(
    ("rows", "features", "depth", "shares"),
    [(256, 1536, 8960, 4), (256, 1536, 1536, 2), (272, 4096, 12288, 2), (144, 4096, 4096, 2), (1024, 4096, 12288, 1)],
)
def test_slices_fill_the_gpu_and_are_no_shorter_than_pays(rows: int, features: int, depth: int, shares: int) -> None:
    """Of Qwen2.5-1.5B and Qwen3-8B, as they were quickest on an H200."""
    assert residual.slices(rows, features, depth) == shares
    assert depth % (64 * shares) == 0


def test_errors() -> None:
    case = given(3, 40, 1536, torch.float32, bias=True)
    for change, message in (
        ({"norm": case["norm"][1:]}, "norm must be"),
        ({"eps": 0.0}, "eps above 0"),
        ({"weight": case["weight"][:, 1:]}, "weight must be"),
        ({"x": case["x"].double()}, "result must be|one dtype"),
    ):
        with pytest.raises(TidarError, match=message):
            residual.linear_add_norm(**(case | change))
