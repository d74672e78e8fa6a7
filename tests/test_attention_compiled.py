"""What the compiler makes of the step's attention for an H200; it needs none, and takes less than the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels import step_attention, workspace
from tidar.kernels.attention_kernel import attention
L, Hq, Hk, D, C, P, A = ({sizes} + (0,))[:7]
plan = workspace.fixed_tiles(D, {size}) if {cached} else workspace.tiles(1, L, Hq, Hk, D, 2048, itemsize={size})
M, names = (L - C - A) // P if P else 0, attention.arg_names
q, k, every = Hq * D, Hk * D, (Hq + 2 * Hk) * D
own = workspace.own_keys(plan, 0 if {cached} else C, M, P, Hq // Hk, A)
absent = ["sinks"]
if {turn}:
    strides = [(L * every, every, D, 1)] * 3
    own = min(own, step_attention.TURNED)
    absent += [] if {norm} else ["q_norm", "k_norm"]
else:
    strides = [(L * q, q, D, 1), (L * k, k, D, 1), (L * every, every, D, 1)]
    absent += ["q_norm", "k_norm", "cos", "sin"] + ["counts"] * (not {cached})
fixed = dict(HEADS=Hk, GROUP=Hq // Hk, QUERIES=L, CAUSAL=C, BLOCK=M, OTHERS=A, PAIRS=A // 3, LEVEL_STEP=P + A,
    D=D, WIDTH=D, PAGE=64,
    WINDOW=0, SOFTCAP=False, ROWS=plan.rows, KEYS=plan.keys, SPLITS=plan.splits, OWN=own, PDL=1 + (plan.rows < 64),
    Q_STEPS=strides[0], K_STEPS=strides[1], V_STEPS=strides[2], PAGE_STEPS=(64 * k, k, D, 1), **dict.fromkeys(absent),
    **workspace.joining(plan, L * Hq // Hk, D))
fixed["APART"] = plan.splits > 1 and fixed["HELD"] >= step_attention.MANY and D <= 128
types = dict.fromkeys("q k v q_norm k_norm cos sin k_pages v_pages out".split(), "*{dtype}")
types |= dict.fromkeys(("part", "peaks", "totals"), "*fp32")
types |= dict.fromkeys(("counts", "table", "lengths", "arrived"), "*i32") | dict(levels="*i64")
types |= dict.fromkeys(("inner", "factor", "eps"), "fp32") | dict.fromkeys(fixed, "constexpr")
types = {{n: types.get(n, "i32") for n in names}}
even = {{(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith(("*", "i32"))}}
source = ASTSource(attention, types, {{(names.index(n),): v for n, v in fixed.items()}}, even)
options = dict(num_warps=plan.warps, num_stages=plan.stages)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
open({path!r}, "wb").write(made.asm["cubin"])
print(made.metadata.shared, plan.rows)
"""
# L queries, Hq and Hk heads of width D, C causal queries, P blocks of masks, A alternates; and the type.
STEP = {
    "1.5B": ((256, 12, 2, 128, 16, 15), "bf16"),
    "8B": ((256, 32, 8, 128, 16, 15), "bf16"),
    "1.5B, a token": ((1, 12, 2, 128, 1, 0), "bf16"),
    "1.5B, float32": ((256, 12, 2, 128, 16, 15), "fp32"),
}
# And whether queries and keys are normed.
SHAPES = {"17M": ((6, 2, 64), True), "1.5B": ((12, 2, 128), False), "8B": ((32, 8, 128), True)}
QUERIES = {1: (1, 0), 16: (16, 0), 32: (16, 1), 80: (16, 4), 256: (16, 15)}
TURNED = {
    f"{model}, {queries}": ((queries, *shape, *parts), "bf16", norm)
    for model, (shape, norm) in SHAPES.items()
    for queries, parts in QUERIES.items()
} | {
    "17M, 80, alternates": ((80, 6, 2, 64, 16, 3, 16), "bf16", True),
    "17M, 31, alternates": ((31, 6, 2, 64, 8, 2, 7), "bf16", True),
    "1.5B, 128, alternates": ((128, 12, 2, 128, 16, 6, 16), "bf16", False),
    "D=256": ((256, 4, 2, 256, 16, 15), "bf16", True),
    "1.5B, float32": (*STEP["1.5B, float32"], True),
    "1.5B, a token, float32": ((1, 12, 2, 128, 1, 0), "fp32", False),
}


def compiled(
    sizes: tuple[int, ...], dtype: str, folder: Path, *, turn: bool = False, norm: bool = False, cached: bool = False
) -> str:
    """The machine code, once it is seen that nothing spills and matrix instructions are what they should be."""
    size = 4 if dtype == "fp32" else 2
    kind = {"turn": turn, "norm": norm, "cached": cached}
    program = COMPILE.format(sizes=sizes, dtype=dtype, size=size, path=str(folder / "cubin"), **kind)
    (folder / "compile.py").write_text(program)
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, folder / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared, rows = map(int, done.stdout.split())
    assert shared <= 227 * 1024
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

    def read(tool: str, option: str) -> str:
        return subprocess.run([f"{tools}/{tool}", option, folder / "cubin"], capture_output=True, text=True).stdout

    assert " STACK:0 " in (used := read("cuobjdump", "--dump-resource-usage")), used
    code = read("nvdisasm", "-c")
    waits, products = code.count("WARPGROUP.DEPBAR"), code.count("HGMMA")
    assert (products > 0) == (rows >= 64 and dtype == "bf16"), "Hopper's matrix instructions, where rows are enough"
    assert waits * 2 < products or not products, "matrix instructions are not serialised"
    return code


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype"), STEP.values(), ids=STEP.keys())
def test_attention_for_hopper(sizes: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    code = compiled(sizes, dtype, tmp_path)
    # The memory order of the counter: parts are stored before it is added to, and not read from a stale L1 line.
    names = ("MEMBAR.ALL.GPU", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL")
    apart = sizes[0] > 1 and dtype == "bf16"
    assert apart == all(name not in code for name in names), "a launch of its own needs none"
    assert apart or (order := [code.index(name) for name in names]) == sorted(order)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype", "norm"), TURNED.values(), ids=TURNED.keys())
def test_attention_that_turns_for_hopper(sizes: tuple[int, ...], dtype: str, norm: bool, tmp_path: Path) -> None:
    compiled(sizes, dtype, tmp_path, turn=True, norm=norm)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "dtype"), STEP.values(), ids=STEP.keys())
def test_attention_to_the_cache_for_hopper(sizes: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    compiled(sizes, dtype, tmp_path, cached=True)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["17M, 1", "1.5B, 1", "1.5B, 16"])
def test_turning_leaves_the_rest_as_it_was(which: str, tmp_path: Path) -> None:
    sizes, dtype, norm = TURNED[which]
    code, plain = (compiled(sizes, dtype, tmp_path, turn=turn, norm=norm) for turn in (True, False))
    # Numbers are turned as they come and brought into place once: were a product's layout taken back to the loads, each
    # of them would stand between barriers.
    assert code.count("BAR.SYNC") <= plain.count("BAR.SYNC") + 4
    # What the queries went through must not change how the prefix's keys are read from shared memory.
    assert code.count("LDSM") >= plain.count("LDSM")
