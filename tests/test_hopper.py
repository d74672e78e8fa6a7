"""The product in CUDA C++ for Hopper GPUs: how it is cut up and compiled, and on such a GPU against its twin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_products import agree, apart, exact
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels import hopper, hopper_code, pdl, products
from tidar.kernels import reference_products as twin
from tidar.kernels.hopper_tiles import HopperTiles, hopper_tiles

HOPPER = torch.cuda.is_available() and hopper_code.able(torch.device("cuda", 0))
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0 and cuda.bindings")
DEVICE = "cuda" if HOPPER else "cpu"
TILES = {
    "64": HopperTiles(64, 32),
    "64 in 2": HopperTiles(64, 96, 2),
    "64 in 4": HopperTiles(64, 64, 4),
    "64 by 208": HopperTiles(64, 208),
    "64, late": HopperTiles(64, 64, late=True),
    "64 in 2, late": HopperTiles(64, 32, 2, late=True),
    "128": HopperTiles(128, 144),
    "128 in 2": HopperTiles(128, 112, 2),
    "128 in 4": HopperTiles(128, 80, 4),
    "128 by 256": HopperTiles(128, 256),
}
PRODUCTS = {
    "1.5B": {"qkv": (2048, 1536), "out": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960)},
    "8B": {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)},
}
SMALL = {"qkv": (640, 384), "out": (384, 384), "gate_up": (2048, 384), "down": (384, 1024)}
HEADS = {"1.5B": (151936, 1536), "8B": (151936, 4096)}


@dataclass(frozen=True)
class Case:
    """A product of N rows and F features, half of them gates if gated."""

    rows: int = 61
    depth: int = 328  # five tiles and an eighth of one
    features: int = 416
    norm: bool = True
    bias: bool = False
    wide: bool = False
    dtype: torch.dtype = torch.bfloat16

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype).to(DEVICE)

    def tensors(self) -> dict[str, Any]:
        """Arguments of `norm_linear`; between rows stands NaN."""
        x = torch.full((self.rows, self.depth + 16), torch.nan, dtype=self.dtype, device=DEVICE)[:, : self.depth]
        return {
            "x": x.copy_(3 * self.normal(self.rows, self.depth)),
            "norm": 1 + self.normal(self.depth, seed=1) / 4 if self.norm else None,
            "weight": self.normal(self.features, self.depth, seed=2) / self.depth**0.5,
            "bias": self.normal(self.features, seed=3) if self.bias else None,
            "eps": 1e-2,
        }

    def out(self, features: int) -> Tensor:
        """Within NaN that is to stay, in front of other rows too."""
        dtype = torch.float32 if self.wide else self.dtype
        return torch.full((self.rows + 130, features + 8), torch.nan, dtype=dtype, device=DEVICE)[
            : self.rows, :features
        ]

    def ready(self, given: dict[str, Any], chunks: int = 3) -> twin.Ready | None:
        """What the product before left."""
        if not self.norm:
            return None
        x, heavy = given["x"], given["x"] * given["norm"]
        squares, weighed = (
            torch.stack([part.float().square().sum(1) for part in t.tensor_split(chunks, 1)]) for t in (x, heavy)
        )
        return twin.Ready(heavy, squares, weighed)


def untouched(out: Tensor) -> bool:
    """Nothing was written behind the rows, nor behind the last one."""
    count, features = out.shape
    assert out._base is not None
    return bool(out._base[:, features:].isnan().all() and out._base[count:].isnan().all())


CASES = {
    "norm": Case(),
    "plain": Case(norm=False),
    "bias": Case(bias=True),
    "one row": Case(rows=1),
    "full": Case(rows=64, features=192, depth=512),
    "rows over": Case(rows=300, bias=True),
    "a shallow one": Case(depth=256, features=208),
    "float16": Case(rows=200, bias=True, dtype=torch.float16),
    "wide": Case(rows=131, wide=True, bias=True),
    "wide, plain": Case(rows=250, wide=True, norm=False),
}

NARROW = {name: case for name, case in CASES.items() if not case.wide}


@on_hopper
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_norm_linear(case: Case, tiles: HopperTiles) -> None:
    given, out = case.tensors(), case.out(case.features)
    with pdl.overlapping(case.bias):
        assert products.norm_linear(**given, out=out, tiles=tiles, ready=case.ready(given)) is out
    assert agree(out, exact(twin.norm_linear, given), case.dtype)
    assert untouched(out)
    alone = products.norm_linear(**given, tiles=tiles)  # the norm by a launch
    assert agree(alone, exact(twin.norm_linear, given), case.dtype)


@on_hopper
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("case", NARROW.values(), ids=NARROW.keys())
def test_norm_gated(case: Case, tiles: HopperTiles) -> None:
    given, out = case.tensors(), case.out(case.features // 2)
    with pdl.overlapping(case.bias):
        assert products.norm_gated(**given, out=out, tiles=tiles, ready=case.ready(given)) is out
    assert agree(out, exact(twin.norm_gated, given), case.dtype)
    assert untouched(out)


@on_hopper
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("case", NARROW.values(), ids=NARROW.keys())
def test_linear_add(case: Case, tiles: HopperTiles) -> None:
    """And what is left for the norm behind, with and without a second one."""
    given, x = case.tensors(), case.out(case.features)
    x.copy_(case.normal(case.rows, case.features, seed=4))
    norm = 1 + case.normal(case.features, seed=5) / 4
    given = {"a": given["x"], "weight": given["weight"], "bias": given["bias"]}
    wide: dict[str, Any] = {n: None if t is None else t.double() for n, t in given.items()}
    wanted = x.double()
    twin.linear_add(wanted, **wide)
    for twice in (False, True):
        y = case.out(case.features)
        y.copy_(x)
        with pdl.overlapping(case.bias):
            ready = products.linear_add(y, **given, norm=norm, tiles=tiles, twice=twice)
        assert agree(y, wanted, case.dtype) and untouched(y)
        assert ready is not None and ready.squares is not None and (ready.weighed is not None) == twice
        torch.testing.assert_close(ready.rows, y * norm, rtol=0, atol=0)
        torch.testing.assert_close(ready.squares.sum(0), y.float().square().sum(1), rtol=1e-5, atol=1e-5)
        if ready.weighed is not None:
            torch.testing.assert_close(ready.weighed.sum(0), ready.rows.float().square().sum(1), rtol=1e-5, atol=1e-5)
    assert products.linear_add(x, **given, tiles=tiles) is None
    assert torch.equal(x, y)


@on_hopper
@pytest.mark.parametrize("tiles", [TILES["128 by 256"], TILES["64 in 4"]], ids=["whole", "in 4"])
@pytest.mark.parametrize("behind", [0, 8, 200, 256, 408])
def test_a_norm_of_what_was_normed(behind: int, tiles: HopperTiles) -> None:
    """Of the last features, as of a head with the transition's gate behind it."""
    case = Case(rows=77, wide=True)
    given = case.tensors()
    given["norm"] = given["norm"] * 0.1  # what the first norm makes is small, so that the second one's epsilon counts
    wanted = exact(twin.norm_linear, given | {"again": 3e-2, "behind": behind})
    assert not agree(exact(twin.norm_linear, given), wanted, case.dtype)
    out = case.out(case.features)
    products.norm_linear(**given, out=out, tiles=tiles, ready=case.ready(given), again=3e-2, behind=behind)
    assert agree(out, wanted, case.dtype)


@on_hopper
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
def test_a_row_does_not_depend_on_others(tiles: HopperTiles) -> None:
    assert apart(Case(rows=40).tensors(), tiles)


@on_hopper
@pytest.mark.parametrize(
    ("model", "rows"),
    [
        *((m, n) for m in PRODUCTS for n in (2, 16, 17, 48, 64, 80, 128)),
        *(("17M", n) for n in (2, 16, 48, 64, 80, 256, 300)),
    ],
)
def test_real_sizes_in_a_graph(model: str, rows: int) -> None:
    """The products of a layer one behind the other, launched again and again while the one before drains."""
    case = Case(rows=rows)
    sizes, cut = PRODUCTS.get(model, SMALL), {}
    for name, (features, depth) in sizes.items():
        tiles = hopper_tiles(rows, features, depth, 2)
        assert tiles is not None
        cut[name] = tiles
    width = sizes["out"][0]
    weights = {n: case.normal(*shape, seed=k) / shape[1] ** 0.5 for k, (n, shape) in enumerate(sizes.items())}
    norm, x = 1 + case.normal(width, seed=7) / 4, case.normal(rows, width, seed=8)
    a = case.normal(rows, sizes["out"][1], seed=9)

    def layer(x: Tensor, ops: Any, cast: Any) -> Tensor:
        x, w = cast(x).clone(), {n: cast(t) for n, t in weights.items()}
        ready = ops.linear_add(x, cast(a), w["out"], None, cast(norm), tiles=cut["out"])
        given = {"eps": 1e-5, "ready": ready}
        gated = ops.norm_gated(x, cast(norm), w["gate_up"], tiles=cut["gate_up"], **given)
        ready = ops.linear_add(x, gated, w["down"], None, cast(norm), tiles=cut["down"])
        given = {"eps": 1e-5, "ready": ready}
        return torch.cat([x, ops.norm_linear(x, cast(norm), w["qkv"], tiles=cut["qkv"], **given)], 1)

    wanted = layer(x, twin, lambda t: t.double())
    for overlapped in (False, True):
        with pdl.overlapping(overlapped):
            layer(x, products, lambda t: t)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = layer(x, products, lambda t: t)
        for _ in range(3):
            out.fill_(torch.nan)
            graph.replay()
        assert agree(out, wanted, case.dtype)
        first = out.clone()
        graph.replay()
        assert torch.equal(out, first), "sums in one order"


@on_hopper
@pytest.mark.parametrize("fault", ["norm", "eps", "weight", "bias", "squares"])
def test_a_wrong_argument_is_caught(fault: str) -> None:
    case = Case(bias=True, wide=True)
    given = case.tensors()
    wanted, ready = exact(twin.norm_linear, given), case.ready(given)
    assert ready is not None and ready.squares is not None
    if fault == "squares":
        ready = ready._replace(squares=ready.squares * 1.1)
    elif fault == "norm":
        ready = ready._replace(rows=ready.rows * 1.05)
    else:
        given[fault] = given[fault] * (300 if fault == "eps" else 1.05)
    found = products.norm_linear(**given, out=case.out(case.features), tiles=TILES["64"], ready=ready)
    assert not agree(found, wanted, case.dtype)


def test_what_the_kernel_has_no_form_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with the remedy."""
    case = Case()
    given, tiles = case.tensors(), TILES["64"]
    x, weight = given["x"], given["weight"]
    with pytest.raises(TidarError, match="take all rows and no quantised weights: use others"):
        products.norm_linear(**given | {"norm": None}, rows=torch.arange(3, device=DEVICE), tiles=tiles)
    with pytest.raises(TidarError, match="x's rows must be .* of 8 numbers, aligned to 16 bytes: use other tiles"):
        products.norm_linear(x[:, 1:-7], None, weight[:, :320].contiguous(), tiles=tiles)
    with pytest.raises(TidarError, match="out's rows must be .* of 8 numbers, aligned to 16 bytes: use other tiles"):
        products.norm_linear(x, None, weight, out=case.normal(case.rows, 420)[:, :416], tiles=tiles)
    with pytest.raises(TidarError, match=r"no torch\.float32 by torch\.float32 for torch\.float32: use other tiles"):
        products.norm_linear(x.float(), None, weight.float(), tiles=tiles)
    with pytest.raises(TidarError, match=r"no torch\.bfloat16 by torch\.bfloat16 for torch\.float32: use other tiles"):
        products.linear_add(case.out(case.features).float(), x, weight, tiles=tiles)
    bias, ready = case.normal(case.features + 1)[1:], case.ready(given)
    with pytest.raises(TidarError, match="aligned to 8 bytes"):
        products.norm_linear(x, None, weight, bias, tiles=tiles)
    with pytest.raises(TidarError, match="behind to 4 columns"):
        products.norm_linear(**given, tiles=tiles, ready=ready, again=1e-2, behind=202)
    with pytest.raises(TidarError, match="a depth of 192 is too little for 4 splits: use other tiles"):
        products.norm_linear(x[:, :192], None, weight[:, :192].contiguous(), tiles=TILES["64 in 4"])
    monkeypatch.setattr(hopper, "able", lambda device: False)
    with pytest.raises(TidarError, match=r"needs a GPU of compute capability 9\.0, and cuda\.bindings: use other"):
        products.norm_linear(x, None, weight, tiles=tiles)
