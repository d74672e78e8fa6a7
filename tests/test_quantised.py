"""Weights in one byte a number: the kernels against their twin, and whole models of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_kernels import _bfloat16_in_the_interpreter  # noqa: F401
from test_products import DEVICE, FEW, MANY, MODELS, MOST, ONE, SOME, SPLIT, TMA, Case, agree, exact

from tidar.errors import TidarError
from tidar.kernels import reference_products as twin
from tidar.kernels.product_tiles import ProductTiles, candidates, default_tiles
from tidar.kernels.quantised import Kind, Quantised, quantise

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from tidar.kernels import products, residual  # noqa: E402

KINDS = get_args(Kind)
TILES: dict[str, ProductTiles | None] = {"1": ONE, "16": FEW, "32": SOME, "64": MANY, "split": SPLIT, "cuBLAS": None}
CASES = {
    "norm": Case(),
    "bias": Case(bias=True, chosen=True),
    "one feature more": Case(rows=16, features=33, norm=False),
    "rows over": Case(rows=67, bias=True),
    "bfloat16": Case(rows=17, bias=True, chosen=True, dtype=torch.bfloat16),
    "float16, wide": Case(rows=9, wide=True, dtype=torch.float16),
}


def quantised(case: Case, kind: Kind) -> dict[str, Any]:
    """Arguments of a case; scales differ much, as rows of a weight do."""
    given = case.tensors()
    sizes = torch.rand(case.features, 1, generator=torch.Generator().manual_seed(9)).to(DEVICE) * 0.9 + 0.1
    return given | {"weight": quantise(given["weight"] * sizes.to(case.dtype), kind)}


# --- products ---


@pytest.mark.parametrize("kind", KINDS)
def test_nearest(kind: Kind) -> None:
    weight = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    made = quantise(weight, kind)
    assert (made.shape, len(made), made.numel(), made.nbytes) == (weight.shape, 7, 448, 448 + 28)
    largest = weight.abs().amax(1, keepdim=True)
    error = (made.dequantised(torch.float64) - weight).abs()
    steps = largest / 254 if kind == "int8" else weight.abs() / 16 + largest / 448 / 2**9
    assert bool((error <= steps * 1.0001).all())
    torch.testing.assert_close(made.dequantised(torch.float32).abs().amax(1, keepdim=True), largest)
    assert torch.equal(made[2:5].dequantised(torch.float32), made.dequantised(torch.float32)[2:5])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_products_equal_the_twin(case: Case, tiles: ProductTiles | None, kind: Kind) -> None:
    given, out = quantised(case, kind), case.out(case.features)
    assert products.norm_linear(**given, out=out, tiles=tiles) is out
    assert agree(out, exact(twin.norm_linear, given), case.dtype)
    if case.chosen or case.features % 2:
        return
    del given["rows"]
    out = case.out(case.features // 2)
    assert agree(products.norm_gated(**given, out=out, tiles=tiles), exact(twin.norm_gated, given), case.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_the_norm_behind_them(tiles: ProductTiles | None, dtype: torch.dtype, kind: Kind) -> None:
    case = Case(rows=18, features=96, bias=True, dtype=dtype)
    given = quantised(case, kind)
    a, norm = given["x"].contiguous(), given["norm"]
    x = torch.randn(18, 96, generator=torch.Generator().manual_seed(3)).to(dtype).to(DEVICE)
    wanted = x.double()
    twin.linear_add(wanted, a.double(), given["weight"], given["bias"].double())
    common = x, a, given["weight"], given["bias"], norm
    if tiles is None:
        ready = residual.linear_add_norm(*common, eps=1e-2)
    else:
        ready = products.linear_add(*common, tiles=tiles)
    assert agree(x, wanted, dtype) and ready is not None
    behind = {"x": x, "norm": norm, "weight": given["weight"], "eps": 1e-2}
    out = products.norm_linear(**behind, ready=ready, tiles=tiles)
    assert agree(out, exact(twin.norm_linear, behind), dtype)


@pytest.mark.parametrize("tiles", [FEW, MANY, MOST, SPLIT], ids=["16", "64", "128", "split"])
def test_a_row_does_not_depend_on_others(tiles: ProductTiles) -> None:
    given = quantised(Case(rows=17, dtype=torch.bfloat16), "int8")
    del given["rows"]
    alone, many = given | {"x": given["x"][9:10]}, given | {"x": given["x"] * 1}
    many["x"][:9] = torch.nan
    for run in (products.norm_linear, products.norm_gated):
        assert torch.equal(run(**many, tiles=tiles)[9:10], run(**alone, tiles=tiles))


@pytest.mark.parametrize("fault", ["next row's", "no ups", "none"])
def test_wrong_scales_are_caught(fault: str) -> None:
    given = quantised(Case(features=32), "int8")
    del given["rows"]
    wanted, right = exact(twin.norm_gated, given), given["weight"]
    wrong = {
        "next row's": right.scale.roll(1),
        "no ups": torch.cat([right.scale[:16], torch.ones_like(right.scale[16:])]),
        "none": right.scale * 1,
    }
    given["weight"] = Quantised(right.values, wrong[fault])
    for tiles in (ONE, FEW, MANY, None):
        assert agree(products.norm_gated(**given, tiles=tiles), wanted, torch.float32) == (fault == "none")


def test_mistakes() -> None:
    made = quantise(torch.randn(4, 16), "int8")
    with pytest.raises(TidarError, match="int8 or float8_e4m3fn"):
        Quantised(made.values.float(), made.scale)
    with pytest.raises(TidarError, match="scale must be"):
        Quantised(made.values, made.scale.half())
    with pytest.raises(TidarError, match="weight must be"):
        products.norm_linear(torch.randn(2, 32), None, made, tiles=FEW)
    with pytest.raises(TidarError, match="without tma"):
        products.norm_linear(torch.randn(2, 16), None, made, tiles=TMA)


# --- tiles ---


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 33, 64, 256, 272, 512, 513])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit(rows: int, itemsize: int) -> None:
    for model in MODELS.values():
        for features, depth in model.values():
            default = default_tiles(rows, features, depth, itemsize, narrow=True)
            assert (default is None) == (rows > (512 if itemsize == 2 else 64))
            tried = list(candidates(rows, features, depth, itemsize, narrow=True))
            assert default in tried[:2] and len(tried) == len(set(tried)) <= 32
            for tiles in filter(None, tried):
                assert not tiles.tma and tiles.splits <= 8 and (tiles.ahead == 0 or tiles.ahead >= 128)
                held = tiles.stages - (tiles.rows < 64)
                assert held * (itemsize * tiles.rows + tiles.cols) * tiles.depth <= 220 * 1024
                assert depth % tiles.depth == 0


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels.product_kernel import product
from tidar.kernels.product_tiles import default_tiles
for rows in (1, 16, 32, 64, 272):
    for name, (features, depth) in {weights}.items():
        plan = default_tiles(rows, features, depth, 2, narrow=True)
        gates, add, chosen, split = name == "mlp", name in ("out", "down"), name == "head", plan.splits > 1
        fixed = plan.constants(depth, features // 2 if gates else features, 2, gates=gates)
        given = dict(squares=not add, rows=chosen, into=False, bias=name == "qkv", part=split, arrived=split)
        given |= dict.fromkeys(("norm", "scaled", "squared"), add) | dict(weighed=False, weighed_squared=False)
        fixed |= dict.fromkeys([n for n in given if not given[n]])
        fixed |= dict(ADD=add, PDL=1 + (plan.rows < 64), CHUNKS=0 if add else 96, HELD=1 if add else 128, BEHIND=0)
        names = product.arg_names
        types = dict.fromkeys(("x", "norm", "bias", "scaled"), "*bf16") | dict(rows="*i64", eps="fp32", again="fp32")
        types |= dict.fromkeys(("squares", "squared", "part", "scale"), "*fp32") | dict(arrived="*i32")
        types |= dict(out="*fp32" if name == "head" else "*bf16", weight={kind!r})
        types |= dict.fromkeys(fixed, "constexpr")
        types = {{n: types.get(n, "i32") for n in names}}
        sixteens = [i for i, n in enumerate(names) if types[n][0] == "*" or n.endswith("_row")]
        even = {{(i,): [["tt.divisibility", 16]] for i in sixteens}}
        source = ASTSource(product, types, {{(names.index(n),): v for n, v in fixed.items()}}, even)
        options = dict(num_warps=plan.warps, num_stages=plan.stages)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        path = {path!r} + f"/{{rows}}-{{name}}.cubin"
        open(path, "wb").write(made.asm["cubin"])
        ptx = made.asm["ptx"]
        before, behind = ptx.split("griddepcontrol.wait;")
        assert "ld.global" not in before and ("prefetch.global.L2" in before) == (plan.ahead > 0)
        loop = ptx.count("cp.async.cg.shared.global"), ptx.count("mma.sync"), ptx.count("wgmma.mma_async")
        print(path, plan.rows, made.metadata.shared, *loop)
"""


@pytest.mark.slow
@pytest.mark.parametrize("pointer", ["*i8", "*fp8e4nv"])
@pytest.mark.parametrize("model", MODELS)
def test_compiles_for_hopper_without_spilling(model: str, pointer: str, tmp_path: Path) -> None:
    (tmp_path / "compile.py").write_text(COMPILE.format(weights=MODELS[model], path=str(tmp_path), kind=pointer))
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    for line in done.stdout.splitlines():
        path, *numbers = line.split()
        tile, shared, copies, plain, hopper = map(int, numbers)
        used = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
        assert " STACK:0 " in used, (line, used)
        assert shared <= 227 * 1024 and copies > 0, line
        assert (plain > 0, hopper > 0) == (tile in (16, 32), tile >= 64), line
    assert len(done.stdout.splitlines()) == 5 * len(MODELS[model])
