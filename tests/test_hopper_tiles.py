"""How the product for Hopper GPUs is cut up and compiled, and where it is used; without a GPU."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_hopper import HEADS, PRODUCTS, SMALL, TILES

from tidar.checkpoint import load_model
from tidar.errors import TidarError
from tidar.fast import ops
from tidar.fast.engine import Engine
from tidar.fast.lean import LeanModel
from tidar.kernels import hopper_code
from tidar.kernels.hopper_tiles import DEPTH, ROOM, HopperTiles, hopper_tiles
from tidar.kernels.product_tiles import PROCESSORS
from tidar.kernels.quantised import Quantised


@pytest.mark.parametrize(
    "sizes", [(63, 64), (192, 64), (64, 24), (64, 272), (64, 0), (64, 64, 3), (64, 64, 8), (128, 256, 2)], ids=str
)
def test_tiles_that_cannot_be(sizes: tuple[int, ...]) -> None:
    rows, cols, splits = (*sizes, 1)[:3]
    with pytest.raises(TidarError, match=r"tiles"):
        HopperTiles(rows, cols, splits)


@pytest.mark.parametrize("rows", [2, 17, 64, 65, 128])
@pytest.mark.parametrize("model", PRODUCTS)
def test_tiles_fill_the_gpu_once(model: str, rows: int) -> None:
    for features, depth in PRODUCTS[model].values():
        tiles = hopper_tiles(rows, features, depth, 2)
        assert tiles is not None and tiles.rows == math.ceil(rows / 64) * 64
        programs = tiles.tiles(features) * tiles.splits
        assert 0.7 * PROCESSORS < programs <= PROCESSORS
    tiles = hopper_tiles(rows, *HEADS[model], 2)
    assert tiles is not None and tiles.splits == 1
    rounds = math.ceil(tiles.tiles(HEADS[model][0]) / PROCESSORS)
    assert tiles.tiles(HEADS[model][0]) > 0.95 * rounds * PROCESSORS


@pytest.mark.parametrize("rows", [2, 17, 64, 65, 256, 512])
def test_small_weights_run_at_once(rows: int) -> None:
    """Few long programs would take longer, and so would a second round."""
    others = (4352, 384), (64, 64), (512, 2048), (64, 8192), (1024, 1024), (1024, 2048)
    for features, depth in [*SMALL.values(), *others]:
        tiles = hopper_tiles(rows, features, depth, 2)
        assert tiles is not None and tiles.rows == 64
        programs = math.ceil(rows / 64) * tiles.tiles(features) * tiles.splits
        assert programs <= ROOM[tiles.splits] or tiles.cols == 128
        assert tiles.late == (tiles.splits == 1 and programs <= PROCESSORS // 4)
        assert tiles.splits == 1 or depth / tiles.splits >= 2 * DEPTH


def test_small_weights_as_they_were_quickest() -> None:
    """On one H200, within whole steps."""
    chosen = {rows: [hopper_tiles(rows, *size, 2) for size in SMALL.values()] for rows in (64, 80)}
    assert chosen[64] == [
        HopperTiles(64, 32, late=True),
        HopperTiles(64, 32, 2),
        HopperTiles(64, 32),
        HopperTiles(64, 32, 4),
    ]
    assert chosen[80] == [
        HopperTiles(64, 64, late=True),
        HopperTiles(64, 32, 2),
        HopperTiles(64, 64),
        HopperTiles(64, 64, 4),
    ]


def test_where_others_serve_better() -> None:
    for sizes in (
        (1, 4096, 4096, 2),
        (129, 4096, 4096, 2),
        (1, 640, 384, 2),
        (513, 640, 384, 2),
        (64, 640, 384, 4),
        (64, 4096, 4096, 4),
        (64, 4100, 4096, 2),
    ):
        assert hopper_tiles(*sizes) is None


def test_without_triton(tmp_path: Path) -> None:
    """The package is imported, and the general path decodes."""
    (tmp_path / "triton.py").write_text("raise ImportError('there is none')")
    program = "import sys; sys.path.insert(0, sys.argv[1]); import tidar.api, tidar.fast.engine, tidar.bench.step"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_hopper_gpu_is_able() -> None:
    """Or all tests of the kernel would be left out."""
    device = torch.device("cuda", 0)
    wanted = torch.version.cuda is not None and torch.cuda.get_device_capability(device) == (9, 0)
    assert hopper_code.able(device) == wanted


def test_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a driver that is new enough, nor such a GPU: other kernels do the same."""

    def able(version: int = 13000, driver: int = 13000, capability: tuple[int, int] = (9, 0)) -> bool:
        nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, version // 1000, version % 1000 // 10))
        found = SimpleNamespace(nvrtc=nvrtc, driver=SimpleNamespace(cuDriverGetVersion=lambda: (0, driver)))
        monkeypatch.setitem(sys.modules, "cuda.bindings", found)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        hopper_code.able.cache_clear()
        return hopper_code.able(torch.device("cuda", 0))

    assert not hopper_code.able(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert able() and able(12080) and able(13020)
    assert not able(13000, 12090) and not able(capability=(10, 0)) and not able(capability=(8, 0))
    assert able()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    hopper_code.able.cache_clear()
    assert not hopper_code.able(torch.device("cuda", 0))
    hopper_code.able.cache_clear()


def test_which_products_of_a_model(converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of all rows, of weights of enough numbers in 16 bits, unless steps are to be deterministic."""
    core = load_model(converted("qwen3"), dtype="bfloat16")
    lean = LeanModel(core, ops.load(plain=True))
    large = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    rows = torch.empty(40, 4096, dtype=torch.bfloat16)
    assert not isinstance(lean._cut(large, rows), HopperTiles)
    monkeypatch.setattr("tidar.fast.lean.able", lambda device: True)
    assert lean._cut(large, rows) == HopperTiles(64, 64, 2)
    assert not isinstance(lean._cut(large, rows, torch.arange(40)), HopperTiles), "chosen ones are gathered"
    assert isinstance(lean._cut(large[:64], rows), HopperTiles) and lean.on_hopper(2) and not lean.on_hopper(1)
    quantised = Quantised(large.to(torch.int8), torch.empty(4096, device="meta"))
    assert not isinstance(lean._cut(quantised, rows), HopperTiles)
    assert not isinstance(LeanModel(core, ops.load(plain=True), deterministic=True)._cut(large, rows), HopperTiles)
    layer = SimpleNamespace(qkv=large, out=large, gate_up=large, down=large)
    odd = SimpleNamespace(qkv=large, out=large, gate_up=large[:4088], down=large)  # no multiple of 16
    monkeypatch.setattr(lean, "layers", [layer, odd])
    assert not lean.on_hopper(40)
    monkeypatch.setattr(lean, "layers", [layer] * 2)
    assert lean.on_hopper(40) and lean.on_hopper(128) and not lean.on_hopper(1) and not lean.on_hopper(129)
    engine = SimpleNamespace(network=SimpleNamespace(lean=lean), core=SimpleNamespace(device="cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50 << 20))
    assert Engine._overlaps(engine, 128) and not Engine._overlaps(engine, 129)  # type: ignore[arg-type]


KINDS: dict[str, dict[str, int]] = {
    "plain": {"SQUARES": 1, "BIAS": 1, "PDL": 1},
    "late": {"SQUARES": 1, "PDL": 2},
    "head": {"SQUARES": 1, "WIDE": 1},
    "ends": {"SQUARES": 1, "WIDE": 1, "AGAIN": 1, "PDL": 1},
    "gated": {"KIND": 1, "SQUARES": 1, "BIAS": 1, "PDL": 1},
    "add": {"KIND": 2, "NORM": 1, "BIAS": 1, "PDL": 1},
    "add, twice": {"KIND": 2, "NORM": 1, "TWICE": 1, "HALF": 1},
}


def _no_compiler() -> bool:
    try:
        from cuda.bindings import nvrtc

        return bool(nvrtc.nvrtcVersion()[0])
    except (ImportError, RuntimeError):
        return True


compiles = pytest.mark.skipif(
    _no_compiler(), reason="needs cuda-bindings and nvidia-cuda-nvrtc, as torch for CUDA does"
)


@compiles
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("tiles", [*TILES.values(), HopperTiles(64, 256, 4), HopperTiles(128, 240, 4)], ids=str)
def test_compiled_without_a_gpu(tiles: HopperTiles, kind: dict[str, int]) -> None:
    """No spills, and products that need not wait for one another; within the shared memory and registers there are."""
    constants = dict.fromkeys(("KIND", "WIDE", "BIAS", "SQUARES", "AGAIN", "NORM", "TWICE", "PDL", "HALF"), 0) | kind
    log = hopper_code.compiled(hopper_code.source(tiles, **constants), "--ptxas-options=-v")[1]
    assert "0 bytes spill stores, 0 bytes spill loads" in log and "serialized" not in log, log
    held = int(log.split(" bytes smem")[0].split()[-1])
    assert tiles.shared + held <= 227 * 2**10


@compiles
def test_a_compiler_that_refuses() -> None:
    line = r"^the CUDA compiler refuses a product \(hopper\.cu\(1\): error: .*\): decode with fast=False, .*$"
    with pytest.raises(TidarError, match=line):
        hopper_code.compiled("nonsense;")
