"""The products of a step against their plain twin; in Triton's interpreter without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from test_kernels import _bfloat16_in_the_interpreter  # noqa: F401
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels import reference_products as twin
from tidar.kernels.hopper_tiles import HopperTiles
from tidar.kernels.product_tiles import ProductTiles, candidates, default_tiles, graph_time
from tidar.kernels.reference_products import Ready

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from tidar.kernels import pdl, products, rowwise  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ONE = ProductTiles(1, 32, 32, 4, 3)
FEW = ProductTiles(16, 16, 64, 4, 3)
SOME = ProductTiles(32, 32, 32, 2, 3)
MANY = ProductTiles(64, 32, 32, 4, 3)
MOST = ProductTiles(128, 64, 16, 4, 3)
SPLIT = ProductTiles(16, 16, 16, 2, 3, splits=4)
TMA = ProductTiles(64, 32, 32, 4, 3, tma=True)
BOTH = ProductTiles(128, 16, 16, 4, 3, splits=5, tma=True)
TILES = {"1": ONE, "16": FEW, "32": SOME, "64": MANY, "128": MOST, "split": SPLIT, "TMA": TMA, "both": BOTH}
TILES_AND_CUBLAS: dict[str, ProductTiles | None] = TILES | {"cuBLAS": None}


@dataclass(frozen=True)
class Case:
    """A product: F rows of the weight (half of them gates, if gated), N of M rows of x."""

    rows: int = 5
    depth: int = 96
    features: int = 38
    norm: bool = True
    bias: bool = False
    chosen: bool = False
    wide: bool = False  # float32 result
    dtype: torch.dtype = torch.float32

    def tensors(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of `norm_linear`; what is not to be read, between rows and in rows not chosen, is NaN."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).to(self.dtype).to(DEVICE)

        total = 2 * self.rows if self.chosen else self.rows
        x = torch.full((total, self.depth + 16), torch.nan, dtype=self.dtype, device=DEVICE)[:, : self.depth]
        rows = torch.randperm(total, generator=draw)[: self.rows].to(DEVICE)
        x[rows] = 3 * normal(self.rows, self.depth)
        return {
            "x": x,
            "norm": 1 + normal(self.depth) / 4 if self.norm else None,
            "weight": normal(self.features, self.depth) / self.depth**0.5,
            "bias": normal(self.features) if self.bias else None,
            "eps": 1e-2,
            "rows": rows if self.chosen else None,
        }

    def out(self, features: int) -> Tensor:
        dtype = torch.float32 if self.wide else self.dtype
        return torch.full((self.rows, features + 3), torch.nan, dtype=dtype, device=DEVICE)[:, :features]


def exact(run: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
    return run(**{n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()})


def agree(out: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """Each row by itself, so that no one is lost in the mean; a NaN never agrees."""
    error = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return bool((error < BOUND[dtype]).all())


def apart(given: dict[str, Any], tiles: ProductTiles | HopperTiles) -> bool:
    """Whether row 9 of x is the same bits alone, and whatever the others are."""
    alone = given | {"x": given["x"][9:10]}
    others = given | {"x": given["x"].clone()}
    others["x"][:9] = torch.nan
    others["x"][10:] *= 100
    return all(
        torch.equal(run(**many, tiles=tiles)[9:10], run(**alone, tiles=tiles))
        for run in (products.norm_linear, products.norm_gated)
        for many in (given, others)
    )


CASES = {
    "norm": Case(),
    "plain": Case(norm=False),
    "one row": Case(rows=1),
    "one feature more": Case(rows=16, features=33),
    "bias": Case(bias=True),
    "chosen": Case(chosen=True),
    "rows over": Case(rows=67, bias=True, chosen=True),
    "depth of 16": Case(depth=16, features=7),
    "bfloat16": Case(rows=17, bias=True, chosen=True, dtype=torch.bfloat16),
    "float16, wide": Case(wide=True, bias=True, dtype=torch.float16),
    "bfloat16, plain, wide": Case(norm=False, chosen=True, wide=True, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("tiles", TILES_AND_CUBLAS.values(), ids=TILES_AND_CUBLAS.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_norm_linear(case: Case, tiles: ProductTiles | None) -> None:
    given, out = case.tensors(), case.out(case.features)
    assert products.norm_linear(**given, out=out, tiles=tiles) is out
    assert agree(out, exact(twin.norm_linear, given), case.dtype)


@pytest.mark.parametrize("tiles", TILES_AND_CUBLAS.values(), ids=TILES_AND_CUBLAS.keys())
@pytest.mark.parametrize("case", [c for c in CASES.values() if not c.chosen and c.features % 2 == 0], ids=str)
def test_norm_gated(case: Case, tiles: ProductTiles | None) -> None:
    given, out = case.tensors(), case.out(case.features // 2)
    del given["rows"]
    assert products.norm_gated(**given, out=out, tiles=tiles) is out
    assert agree(out, exact(twin.norm_gated, given), case.dtype)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("case", [c for c in CASES.values() if not c.chosen], ids=str)
def test_linear_add(case: Case, tiles: ProductTiles) -> None:
    given = case.tensors()
    x = case.out(case.features).copy_(torch.randn(case.rows, case.features))
    given = {"x": x, "a": given["x"], "weight": given["weight"], "bias": given["bias"]}
    wanted: dict[str, Any] = {n: None if t is None else t.double() for n, t in given.items()}
    twin.linear_add(**wanted)
    assert products.linear_add(**given, tiles=tiles) is None
    assert agree(x, wanted["x"], case.dtype)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("case", [CASES["norm"], CASES["rows over"], CASES["bfloat16"]], ids=str)
def test_a_product_added_to_chosen_rows(case: Case, tiles: ProductTiles) -> None:
    given: dict[str, Any] = replace(case, chosen=False).tensors()
    draw = torch.Generator().manual_seed(1)
    into = torch.randperm(2 * case.rows + 3, generator=draw)[: case.rows].int().to(DEVICE)
    x = torch.randn(2 * case.rows + 3, case.features, generator=draw).to(case.dtype).to(DEVICE)
    before, wanted = x.clone(), x.double()
    given = {"a": given["x"], "weight": given["weight"], "bias": given["bias"]}
    widened: dict[str, Any] = {n: None if t is None else t.double() for n, t in given.items()}
    twin.linear_add(wanted, **widened, into=into)
    assert products.linear_add(x, **given, into=into, tiles=tiles) is None
    assert agree(x[into.long()], wanted[into.long()], case.dtype)
    others = torch.ones(len(x), dtype=torch.bool, device=DEVICE)
    others[into.long()] = False
    assert torch.equal(x[others], before[others]), "not even rounded"


@pytest.mark.parametrize("tiles", TILES_AND_CUBLAS.values(), ids=TILES_AND_CUBLAS.keys())
@pytest.mark.parametrize("case", [c for c in CASES.values() if c.norm and not c.bias], ids=str)
def test_a_norm_between_two_products(case: Case, tiles: ProductTiles | None) -> None:
    """The product before leaves what the one behind needs, whichever tiles either has."""
    given = case.tensors()
    x, rows, norm = given["x"].nan_to_num(1.0), given["rows"], given["norm"]
    a, weight = torch.randn(len(x), 32, device=DEVICE).to(case.dtype), torch.randn(case.depth, 32, device=DEVICE)
    cut = SOME if tiles in (ONE, FEW) else FEW
    ready = products.linear_add(x, a, weight.to(case.dtype), norm=norm, tiles=cut, twice=case.chosen)
    assert ready is not None and ready.squares is not None
    torch.testing.assert_close(ready.squares.sum(0), x.float().pow(2).sum(1))
    assert (ready.weighed is None) != case.chosen
    if ready.weighed is not None:
        torch.testing.assert_close(ready.weighed.sum(0), ready.rows.float().pow(2).sum(1))
    kept, given = x.clone(), given | {"x": x}
    x_gone = given | {"x": torch.full_like(x, torch.nan)}  # cuBLAS cannot use what was left
    out = products.norm_linear(**(given if tiles is None else x_gone), ready=ready, tiles=tiles)
    assert agree(out, exact(twin.norm_linear, given), case.dtype) and torch.equal(x, kept)
    if rows is None and case.features % 2 == 0:
        both = (given if tiles is None else x_gone) | {"ready": ready, "tiles": tiles}
        del both["rows"], given["rows"]
        assert agree(products.norm_gated(**both), exact(twin.norm_gated, given), case.dtype)
    # Rows that are normed already, as `linear_add_norm` leaves them.
    done = Ready(rowwise.norm(x, norm, eps=given["eps"]), None)
    out = products.norm_linear(**x_gone, ready=done, tiles=tiles)
    assert agree(out, exact(twin.norm_linear, given | {"rows": rows}), case.dtype)


@pytest.mark.parametrize("left", ["both", "sums", "normed", "nothing"])
@pytest.mark.parametrize("tiles", [FEW, replace(FEW, splits=2), None], ids=["whole", "split", "cublas"])
def test_a_norm_of_what_was_normed(tiles: ProductTiles | None, left: str) -> None:
    """Of all features, or of the last ones beside those of one norm, by what the product before left; others norm in a
    launch."""
    x, weight, gate = (torch.randn(*size, device=DEVICE) for size in ((37, 64), (64,), (20, 64)))
    weight *= 0.1  # what the first norm makes is small, so that the second one's epsilon counts
    given: dict[str, Any] = {"x": x, "norm": weight, "weight": gate, "eps": 1e-2, "again": 3e-2}
    wanted = exact(twin.norm_linear, given)
    once = exact(twin.norm_linear, given | {"again": None})
    assert not agree(once, wanted, torch.float32)
    heavy = x * weight
    sums, weighed = (each.pow(2).view(37, 2, 32).sum(2).T.contiguous() for each in (x, heavy))
    ready = {
        "both": Ready(heavy, sums, weighed),
        "sums": Ready(heavy, sums),
        "normed": Ready(rowwise.norm(x, weight, eps=1e-2), None),
        "nothing": None,
    }[left]
    options: dict[str, Any] = given | {"ready": ready, "tiles": tiles}
    rows = torch.tensor([30, 2, 2, 0], dtype=torch.int32, device=DEVICE)
    assert agree(products.norm_linear(**options), wanted, torch.float32)
    assert agree(products.norm_linear(**options, rows=rows), wanted[rows.long()], torch.float32)
    for behind in (7, 16):  # within a tile of columns, and where one begins
        mixed = torch.cat([once[:, :behind], wanted[:, behind:]], 1)
        assert torch.equal(exact(twin.norm_linear, given | {"behind": behind}), mixed)
        if left == "both" and tiles is not None:
            assert agree(products.norm_linear(**options, behind=behind), mixed, torch.float32)
            found = products.norm_linear(**options, behind=behind, rows=rows)
            assert agree(found, mixed[rows.long()], torch.float32)
        else:
            with pytest.raises(TidarError, match="twice=True"):
                products.norm_linear(**options, behind=behind)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_norm_and_gated(case: Case) -> None:
    given, out = case.tensors(), case.out(case.depth)
    rows = given["rows"].int() if case.chosen else None
    given = {"x": given["x"], "weight": case.tensors(1)["weight"][0], "eps": 1e-2, "rows": rows}
    assert rowwise.norm(**given, out=out) is out
    assert agree(out, exact(twin.norm, given), case.dtype)
    gu, out = (rowwise.norm(**given) * 3), case.out(case.depth // 2)
    assert rowwise.gated(gu, out) is out
    assert agree(out, twin.gated(gu.double()), case.dtype)


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_others(tiles: ProductTiles, dtype: torch.dtype) -> None:
    given = Case(rows=17, dtype=dtype).tensors()
    del given["rows"]
    assert apart(given, tiles)


def test_splits_meet_in_any_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares are written before they are read, counters are 0 again, and who comes last does not matter."""
    given = Case(rows=70, norm=False).tensors()
    wanted, made = products.norm_linear(**given, tiles=SPLIT), list[Tensor]()
    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> Tensor:
        made.append(empty(*args, **options))
        return made[-1].fill_(torch.nan)

    if DEVICE == "cpu":
        builder = triton.runtime.interpreter.interpreter_builder
        place = builder.set_grid_idx
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: place(x, y, SPLIT.splits - 1 - z))
    monkeypatch.setattr(torch, "empty", poisoned)
    arrived = products._arrived(given["x"].device)
    for _ in range(2):
        assert torch.equal(products.norm_linear(**given, tiles=SPLIT), wanted)
        assert not arrived.any()
    assert [share.numel() for share in made] == [4 * 80 * 48] * 2


def test_one_after_another_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows no programmatic dependent launch; a GPU from Hopper on does, unless told not to."""
    assert pdl.options(torch.device("cpu")) == {"PDL": 0, "launch_pdl": False}
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for interpreted, enabled in ((True, True), (False, True), (False, False)):
        pdl._able.cache_clear()
        monkeypatch.setattr(triton.knobs.runtime, "interpret", interpreted)
        able = enabled and not interpreted
        with pdl.overlapping(enabled):
            for when, constant in ((pdl.EARLY, 1), (pdl.LATE, 2), (pdl.THEN, 3)):
                assert pdl.options(device, when=when) == {"PDL": able * constant, "launch_pdl": able}
    pdl._able.cache_clear()


def test_when_the_next_kernel_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late behind small tiles, unless they fill an H200 for one round."""
    seen: list[object] = []

    def noting(device: torch.device, *, when: Any = pdl.EARLY) -> dict[str, int]:
        seen.append(when)
        return pdl.options(device, when=when)

    monkeypatch.setattr(products, "options", noting)
    x = torch.zeros(65, 16, device=DEVICE)
    for rows, features in ((1, 1056), (1, 1064), (1, 2112), (1, 2120), (65, 640)):
        tiles = ProductTiles(1 if rows == 1 else 64, 8 if rows == 1 else 16, 16, 1, 2)
        products.norm_linear(x[:rows], None, torch.zeros(features, 16, device=DEVICE), tiles=tiles)
    assert seen == [pdl.LATE, pdl.EARLY, pdl.EARLY, pdl.LATE, pdl.EARLY]


def test_twin_is_the_modules() -> None:
    """In the order of Hugging Face's: normalised, weighted, projected."""
    given = Case(bias=True, chosen=True, dtype=torch.float64).tensors()
    x, norm, weight, bias, eps, rows = given.values()
    y = norm * (x[rows] * torch.rsqrt(x[rows].pow(2).mean(-1, keepdim=True) + eps))
    y = torch.nn.functional.linear(y, weight, bias)
    torch.testing.assert_close(twin.norm_linear(**given), y)
    wanted = torch.nn.functional.silu(y[:, :19]) * y[:, 19:]
    torch.testing.assert_close(twin.norm_gated(x[rows], norm, weight, bias, eps=eps), wanted)
    torch.testing.assert_close(twin.gated(y), wanted)
    a = x[rows] * 1
    x = a.clone()
    twin.linear_add(x, a, a.T @ a)
    torch.testing.assert_close(x, a + a @ (a.T @ a))


# --- planted faults ---


@pytest.mark.parametrize("fault", ["norm", "eps", "rows", "weight", "bias"])
def test_a_wrong_argument_is_caught(fault: str) -> None:
    case = Case(bias=True, chosen=True, features=32)
    given = case.tensors()
    wanted = exact(twin.norm_linear, given)
    wrong = given[fault].flip(0) if fault == "rows" else given[fault] * (2 if fault == "eps" else 1.001)
    for tiles in (ONE, FEW, MANY):
        out = products.norm_linear(**given | {fault: wrong}, tiles=tiles)
        assert not agree(out, wanted, case.dtype)


# --- tiles ---


def weights(width: int, qkv: int, mlp: int, head: int) -> dict[str, tuple[int, int]]:
    """Features and depth of a model's products."""
    square = {"qkv": (qkv, width), "out": (width, width), "mlp": (2 * mlp, width), "down": (width, mlp)}
    return square | {"head": (head, width)}


MODELS = {
    "1.5B": weights(1536, 2048, 8960, 151936),
    "8B": weights(4096, 6144, 12288, 151936),
    "small": weights(384, 640, 1024, 4096),
}


# Fastest of what was measured in bfloat16 on an H200, as rows, columns, depth, warps and stages; None is cuBLAS. The
# small model's of 48 and 56 rows, and from them its mlp of 32, within a whole step.
FASTEST: dict[int, dict[str, dict[str, tuple[int, ...] | None]]] = {
    1: {
        "small": {"qkv": (1, 8, 128, 2, 4), "out": (1, 8, 128, 2, 4), "mlp": (1, 8, 128, 2, 4),
                  "down": (1, 8, 512, 4, 3), "head": (1, 16, 128, 2, 4)},
        "1.5B": {"qkv": (1, 8, 512, 4, 4), "out": (1, 8, 512, 4, 4), "mlp": (1, 16, 512, 4, 4),
                 "down": (1, 8, 256, 4, 8), "head": (1, 16, 512, 4, 4)},
        "8B": dict.fromkeys(("qkv", "out", "mlp", "down", "head"), (1, 16, 256, 4, 7)),
    },
    16: {
        "small": {"qkv": (16, 16, 128, 2, 4), "out": (16, 16, 128, 2, 4), "mlp": (16, 16, 128, 2, 4),
                  "down": (16, 16, 256, 4, 5), "head": (16, 16, 128, 2, 4)},
        "1.5B": {"qkv": (16, 16, 256, 4, 5), "out": (16, 16, 256, 4, 7), "mlp": (16, 64, 128, 2, 3),
                 "down": (16, 16, 256, 4, 5), "head": (16, 64, 128, 2, 5)},
        "8B": {"qkv": (16, 16, 256, 4, 5), "out": (16, 16, 256, 4, 5), "mlp": (16, 64, 128, 2, 3),
               "down": (16, 16, 256, 4, 5), "head": (16, 64, 128, 2, 5)},
    },
    32: {
        "small": {"qkv": (16, 16, 128, 2, 4), "out": (16, 16, 128, 2, 4), "mlp": (64, 32, 128, 4, 4),
                  "down": (16, 16, 256, 4, 5)},
        "1.5B": {"qkv": (32, 16, 256, 4, 7), "out": (32, 16, 256, 4, 7), "mlp": (64, 64, 64, 4, 4), "down": None},
        "8B": {"qkv": (32, 32, 128, 2, 7), "out": (32, 32, 256, 4, 5), "mlp": (64, 64, 64, 4, 4),
               "down": (32, 32, 256, 4, 5)},
    },
    48: {
        "small": {"qkv": (16, 16, 128, 2, 4), "out": (16, 16, 128, 2, 4), "mlp": (64, 32, 128, 4, 4),
                  "down": (16, 16, 256, 4, 5), "head": (64, 64, 128, 4, 4)},
    },
    56: {
        "small": {"qkv": (64, 16, 128, 4, 4), "out": (16, 16, 128, 2, 4), "mlp": (64, 32, 128, 4, 4),
                  "down": (16, 16, 512, 2, 3), "head": (64, 64, 128, 4, 4)},
    },
    80: {
        "small": {"qkv": (64, 64, 128, 4, 4), "out": (16, 16, 128, 2, 4), "mlp": (64, 64, 128, 4, 4),
                  "down": (16, 16, 256, 4, 5)},
    },
    256: {
        "small": {"qkv": (64, 64, 128, 4, 4), "out": (64, 32, 64, 4, 4), "mlp": (64, 64, 128, 4, 4),
                  "down": (64, 32, 128, 4, 7)},
        "1.5B": dict.fromkeys(("qkv", "out", "mlp", "down")),
        "8B": dict.fromkeys(("qkv", "out", "mlp", "down")),
    },
}  # fmt: skip
"""Within 8 %, so that the rules can be few; the products' own time, without what a launch ahead hides."""


@pytest.mark.parametrize("rows", FASTEST)
@pytest.mark.parametrize("model", MODELS)
def test_default_tiles(rows: int, model: str) -> None:
    for name, fastest in FASTEST[rows].get(model, {}).items():
        tiles = default_tiles(rows, *MODELS[model][name], 2)
        cut = tiles and (tiles.rows, tiles.cols, tiles.depth, tiles.warps, tiles.stages)
        assert cut == fastest, (name, tiles)
        assert tiles is None or (tiles.ahead > 0) == (tiles.rows < 64)
        assert tiles is None or tiles.tma == (tiles.rows == tiles.cols == 64 and model == "small")


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 3, 16, 48, 256, 1000])
def test_candidates_fit(rows: int, itemsize: int) -> None:
    for model in MODELS.values():
        for features, depth in model.values():
            tried = list(candidates(rows, features, depth, itemsize))
            assert {None, default_tiles(rows, features, depth, itemsize)} <= set(tried[:2])
            assert len(tried) == len(set(tried)) <= 32
            for tiles in filter(None, tried):
                assert tiles.splits <= 8 and (tiles.ahead > 0) <= (tiles.rows < 64)
                held = tiles.stages - (tiles.rows < 64)
                assert held * (tiles.rows + tiles.cols) * tiles.depth * itemsize <= 220 * 1024
                assert depth % tiles.depth == 0


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_candidates_on_the_device() -> None:
    """Every candidate runs, is right and can be captured."""
    case = Case(rows=16, depth=1536, features=2048, bias=True, dtype=torch.bfloat16)
    given = case.tensors()
    wanted = exact(twin.norm_linear, given)
    for tiles in candidates(16, 2048, 1536, 2):
        assert agree(products.norm_linear(**given, tiles=tiles), wanted, case.dtype)
    out = case.out(2048)
    for tiles in candidates(16, 2048, 1536, 2):
        assert graph_time([partial(products.norm_linear, **given, out=out, tiles=tiles)]) > 0
        assert agree(out, wanted, case.dtype)


# --- mistakes ---

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": torch.float64}, "reference_products"),
    "depth": ({"depth": 24}, "reference_products"),
    "x": ({"x": torch.zeros(96, 5).T}, "contiguous rows"),
    "weight": ({"weight": torch.zeros(38, 95)}, "weight must be"),
    "weight's strides": ({"weight": torch.zeros(96, 38).T}, "contiguous"),
    "norm": ({"norm": torch.zeros(95)}, "norm must be"),
    "eps": ({"eps": 0.0}, "eps above 0"),
    "bias": ({"bias": torch.zeros(37)}, "bias must be"),
    "mixed": ({"bias": torch.zeros(38, dtype=torch.float16)}, "one dtype"),
    "rows": ({"rows": torch.zeros(5)}, "rows must be"),
    "out": ({"out": torch.zeros(5, 37)}, "the result must be"),
    "out's dtype": ({"out": torch.zeros(5, 38, dtype=torch.float16)}, "the result must be"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(change: dict[str, Any], message: str) -> None:
    case = Case(**{n: change[n] for n in change if n in ("dtype", "depth")})
    given = case.tensors() | {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in change.items()}
    given = {n: t for n, t in given.items() if n not in ("dtype", "depth")}
    with pytest.raises(TidarError, match=message):
        products.norm_linear(**given, tiles=FEW)


def test_more_mistakes() -> None:
    with pytest.raises(TidarError, match="2·F"):
        products.norm_gated(torch.zeros(2, 16), None, torch.zeros(3, 16))
    with pytest.raises(TidarError, match="2·F"):
        rowwise.gated(torch.zeros(2, 17))
    for sizes in ((24, 16, 16, 4, 2), (8, 16, 16, 4, 2), (16, 4, 16, 4, 2), (16, 16, 8, 4, 2), (16, 16, 16, 4, 0)):
        with pytest.raises(TidarError, match="powers of 2"):
            ProductTiles(*sizes)
    for wrong in ({"splits": 0}, {"ahead": 96}, {"ahead": 32}, {"tma": True}):
        with pytest.raises(TidarError):
            replace(FEW, **wrong)
    a, weight = torch.zeros(2, 16), torch.zeros(4097 * 16, 16)
    with pytest.raises(TidarError, match="too many to be split"):
        products.norm_linear(a, None, weight, tiles=SPLIT)
    for into, norm in ((torch.zeros(3).int(), None), (torch.zeros(2), None), (torch.zeros(2).int(), torch.ones(32))):
        with pytest.raises(TidarError, match="into must be"):
            products.linear_add(torch.zeros(9, 32), a, weight[:32], None, norm, into=into, tiles=FEW)
    odd = torch.zeros(3, 17)[:, 1:]
    with pytest.raises(TidarError, match="aligned to 16 bytes"):
        products.norm_linear(odd, None, weight[:32], tiles=TMA)


# --- compiled ---

COMPILE = """
from dataclasses import replace
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels import products
from tidar.kernels.product_kernel import product
from tidar.kernels.product_tiles import candidates, default_tiles
for rows in (1, 16, 32, 64, 256):
    for name, (features, depth) in {weights}.items():
        plan = default_tiles(rows, features, depth, 2)
        if plan is None and rows < 256:
            continue
        plan = plan or list(candidates(rows, features, depth, 2))[-1]
        gates, add, chosen = name == "mlp", name in ("out", "down"), name == "head"
        plan = replace(plan, tma=plan.tma and not chosen)
        fixed = plan.constants(depth, features // 2 if gates else features, 2, gates=gates)
        split = plan.splits > 1
        into = name == "down"
        given = dict(squares=not add, rows=chosen, into=into, bias=name == "qkv", part=split, arrived=split)
        given |= dict.fromkeys(("norm", "scaled", "squared", "weighed_squared"), add and not into)
        given["weighed"] = chosen and rows > 1
        fixed |= dict.fromkeys([n for n in given if not given[n]]) | dict(scale=None)
        fixed |= dict(ADD=add, BEHIND=features - 256 if name == "head" else 0, PDL=1 + (plan.rows < 64))
        fixed |= dict(CHUNKS=0 if add else 96, HELD=1 if add else 128)
        names = product.arg_names
        types = dict.fromkeys(("x", "norm", "weight", "bias", "scaled"), "*bf16")
        types |= dict(rows="*i64", into="*i32", eps="fp32", again="fp32")
        types |= dict.fromkeys(("squares", "squared", "weighed", "weighed_squared", "part"), "*fp32")
        types |= dict(arrived="*i32")
        types |= dict(out="*fp32" if name == "head" else "*bf16")
        types |= dict.fromkeys(fixed, "constexpr")
        if plan.tma:
            types["x"] = f"tensordesc<bf16[{{plan.rows}},{{plan.depth}}]>"
            halves = 2 if gates else 1
            types["weight"] = f"tensordesc<bf16[{{plan.cols // halves}},{{halves}},{{plan.depth}}]>"
        types = {{n: types.get(n, "i32") for n in names}}
        sixteens = [i for i, n in enumerate(names) if types[n][0] == "*" or n.endswith("_row")]
        even = {{(i,): [["tt.divisibility", 16]] for i in sixteens}}
        source = ASTSource(product, types, {{(names.index(n),): v for n, v in fixed.items()}}, even)
        options = dict(num_warps=plan.warps, num_stages=plan.stages)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        path = {path!r} + f"/{{rows}}-{{name}}.cubin"
        open(path, "wb").write(made.asm["cubin"])
        ptx = made.asm["ptx"]
        loop = ptx.count("cp.async.cg.shared.global"), ptx.count("mma.sync"), ptx.count("wgmma.mma_async")
        loop = ptx.count("cp.async.bulk.tensor") if plan.tma else loop[0], *loop[1:]
        before, behind = ptx.split("griddepcontrol.wait;")
        touched = [n for n in ("ld.global", "st.global", "cp.async", "atom.", "red.") if n in before]
        assert not touched and "cp.async" in behind, touched
        assert ("griddepcontrol.launch_dependents" in behind) == (plan.rows < 64)
        assert ("prefetch.global.L2" in before) == (plan.ahead > 0)
        print(path, rows, plan.rows, made.metadata.shared, *loop)
"""
"""The interpreter takes programs that the compiler does not; the compiler needs no GPU."""


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_compiles_for_hopper_without_spilling(model: str, tmp_path: Any) -> None:
    (tmp_path / "compile.py").write_text(COMPILE.format(weights=MODELS[model], path=str(tmp_path)))
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    for line in done.stdout.splitlines():
        path, *numbers = line.split()
        _, tile, shared, copies, plain, hopper = map(int, numbers)
        used = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
        assert " STACK:0 " in used, (line, used)
        assert shared <= 227 * 1024, line
        assert copies > 0, "weights are loaded ahead, 16 bytes a thread"
        assert (plain > 0, hopper > 0) == (tile in (16, 32), tile >= 64), line
    assert len(done.stdout.splitlines()) >= 3 * len(MODELS[model])
