"""The kernels that choose drafts from shortlists: ties, garbage, who comes last, mistakes, a GPU, and the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tidar.errors import TidarError
from tidar.kernels import reference_chain as twin

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from test_chain import DEVICE, Case, chances_by_hand, computed, follows, judged  # noqa: E402

from tidar.kernels import chain  # noqa: E402
from tidar.kernels.shortlists import Shortlists  # noqa: E402


def test_the_first_on_the_list_of_equals() -> None:
    """Which is the lowest token, unless that is of a later group: each takes 8 tokens in turn."""
    turn = 8 * 32
    case = Case(places=5, vocab=2 * turn + 8)
    given = case.tensors()
    given["mix"].zero_()
    given["made"].fill_(True)
    given["suppressed"] = torch.arange(case.vocab, device=DEVICE) < 3
    given["base"].fill_(-1.5)
    given["base"][:, 1] = torch.tensor([-0.0, 0.0], device=DEVICE).repeat(turn + 4).roll(1)
    given["base"][:, 2, 8:20], given["base"][:, 2, 20:], given["base"][:, 2, :8] = -2.0, -torch.inf, -3.0
    given["base"][:, 3, [16, turn + 1]] = 1.0  # groups 2 and 0
    given["base"][:, 4] = -torch.inf
    assert computed(case, given).tolist() == [[3, 3, 8, turn + 1, 0]] * 2
    assert torch.equal(twin.chain(**given).cpu(), computed(case, given).cpu())


@pytest.mark.parametrize("case", [Case(places=4, vocab=700), Case(rows=1, vocab=20_000)], ids=["few", "many"])
def test_many_equals(case: Case) -> None:
    """Small integers, of which one is weighed: sums are exact in any order, and most scores occur more than once."""
    for seed in range(2):
        given, lists = case.tensors(seed), case.shortlists()
        given["base"].round_()
        given["mix"].round_()[:, 1:] = 0
        assert torch.equal(computed(case, given, lists), twin.chain(**given))
        assert torch.equal(lists.tokens.long(), twin.shortlist(given["base"], given["suppressed"]).flatten(0, 1))


def test_nan_neither_hangs_nor_stays() -> None:
    case = Case()
    given, lists = case.tensors(), case.shortlists()
    wanted = twin.chain(**given)
    for name in ("base", "state"):
        drafts, chances = judged(case, given | {name: torch.full_like(given[name], torch.nan)}, lists)
        assert ((drafts >= 0) & (drafts < case.vocab)).all()
        assert not chances[~given["made"]].any()
    assert torch.equal(computed(case, given, lists), wanted)


def test_what_nobody_made_is_not_read() -> None:
    case = Case(temperature=(0.7,))
    given = case.tensors(2)
    wanted = twin.chain(**given)
    for name in ("base", "state"):
        given[name][~given["made"]] = torch.nan
    drafts, chances = judged(case, given)
    assert not given["made"].all() and torch.equal(drafts, wanted)
    assert ((chances > 0) == given["made"]).all()


def test_memory_made_anew() -> None:
    given = Case(rows=1, temperature=(1.0,)).tensors()
    assert follows(given, chain.chain(**given))


# --- who comes last ---


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's programs, from the last to the first: another one walks."""
    if DEVICE == "cuda":
        pytest.skip("a GPU's programs come as they like")
    from triton.runtime.interpreter import InterpreterBuilder

    real = InterpreterBuilder.set_grid_idx

    def turned(self: Any, *at: int) -> None:
        real(self, *(size - 1 - i for size, i in zip(self.grid_dim, at, strict=True)))

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", turned)


@pytest.mark.usefixtures("backwards")
def test_whoever_comes_last() -> None:
    case = Case(temperature=(0.9,))
    lists = case.shortlists()
    for seed in range(2):
        given, wanted = case.tensors(seed), torch.empty(case.rows, case.places)
        drafts, chances = judged(case, given, lists)
        assert torch.equal(drafts, twin.chain(**given, chances=wanted)), f"launch {seed}"
        torch.testing.assert_close(chances, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(DEVICE == "cuda", reason="its programs may come in another order")
def test_a_stale_counter_is_caught() -> None:
    """What `computed` asks of the counters: with one too many, somebody walks before all are there."""
    case = Case(places=4)
    given, lists = case.tensors(1), case.shortlists()
    given["made"].fill_(True)
    lists.arrived.fill_(case.places * (256 // 64) - 1)
    with pytest.raises(AssertionError):
        computed(case, given, lists)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 8, 40])
def test_on_a_gpu(rows: int, dtype: torch.dtype) -> None:
    """Many launches and replays of a graph with fresh inputs, alternately, in one memory."""
    sizes = {"vocab": 4096, "width": 256} if rows == 1 else {"vocab": 700, "width": 40}
    case = Case(rows=rows, places=15, temperature=(0.8, 0.0), dtype=dtype, **sizes)
    held, lists = case.tensors(), case.shortlists()
    out = torch.empty(rows, 15, dtype=torch.int64, device=DEVICE)
    chances = torch.empty(rows, 16, device=DEVICE)[:, 1:]

    def run() -> None:
        chain.chain(**held, out=out, chances=chances, shortlists=lists)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for seed in range(1, 60):
        fresh = case.tensors(seed)
        for name, tensor in held.items():
            if isinstance(tensor, Tensor):
                tensor.copy_(fresh[name])
        kept: tuple[Tensor, Tensor] | None = None
        for call in (graph.replay, run, graph.replay):
            out.fill_(-7)
            chances.fill_(-7)
            call()
            kept = (out.clone(), chances.clone()) if kept is None else kept
            assert torch.equal(out, kept[0]) and torch.equal(chances, kept[1]) and not lists.arrived.any(), (
                f"launch {seed}"
            )
        if seed < 4:  # by hand is slow
            given = {n: t.cpu() if isinstance(t, Tensor) else t for n, t in held.items()}
            assert follows(given, out.cpu())
            expected = chances_by_hand(given, out.cpu())
            torch.testing.assert_close(chances.cpu().double(), expected, rtol=2e-2, atol=1e-5)


# --- mistakes, and the compiler ---


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"base": torch.zeros(2, 5, 77, dtype=torch.float64)}, "tidar.kernels.reference_chain"),
    "places": ({"state": torch.zeros(2, 4, 24)}, "logits and states"),
    "vocabulary": ({"mix": torch.zeros(76, 24)}, "tables must be"),
    "mixed": ({"mix": torch.zeros(77, 24, dtype=torch.float16)}, "one dtype"),
    "strided table": ({"mix": torch.zeros(24, 77).T}, "contiguous"),
    "strided logits": ({"base": torch.zeros(2, 77, 5).transpose(1, 2)}, "contiguous"),
    "integers": ({"temperature": torch.zeros(2, dtype=torch.long)}, "floating point"),
    "suppressed": ({"suppressed": torch.zeros(77, dtype=torch.int64)}, "bool"),
    "made": ({"made": torch.zeros(2, 4, dtype=torch.bool)}, "made must be"),
    "made of numbers": ({"made": torch.zeros(2, 5, dtype=torch.int8)}, "made must be"),
    "given nothing": ({"given": torch.zeros(2, dtype=torch.int32)}, "given must be"),
    "given": ({"given": torch.zeros(2), "out": torch.zeros(2, 5, dtype=torch.int64)}, "given must be"),
    "temperature": ({"temperature": torch.zeros(3)}, "temperature"),
    "first": ({"first": torch.zeros(2, 1, dtype=torch.int64)}, "first"),
    "seed": ({"seed": torch.zeros(2, dtype=torch.int32)}, "seed"),
    "lengths": ({"lengths": torch.zeros(2, dtype=torch.int64)}, "int32"),
    "out": ({"out": torch.zeros(2, 5, dtype=torch.int32)}, "out must be"),
    "chances": ({"chances": torch.zeros(2, 5, dtype=torch.float64)}, "chances must be"),
    "chances of others": ({"chances": torch.zeros(2, 6)}, "chances must be"),
    "rows of a batch": ({"rows": torch.zeros(2, 5, dtype=torch.int32)}, "if rows are chosen"),
    "rows": (
        {"base": torch.zeros(9, 77), "state": torch.zeros(9, 24), "rows": torch.zeros(2, 5, dtype=torch.int64)},
        "rows must be",
    ),
    "rows without lists": (
        {"base": torch.zeros(9, 77), "state": torch.zeros(9, 24), "rows": torch.zeros(2, 5, dtype=torch.int32)},
        "must have been prepared",
    ),
    "shortlists": ({"shortlists": Shortlists.for_step(2, 4, device=DEVICE)}, "shortlists were made for"),
    "lists of few": (
        {
            "base": torch.zeros(19, 77),
            "state": torch.zeros(19, 24),
            "rows": torch.zeros(2, 5, dtype=torch.int32),
            "shortlists": Shortlists.for_step(2, 5, states=18, device=DEVICE),
        },
        "shortlists were made for",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"out": None, "chances": None, "shortlists": None} | Case(places=5, vocab=77).tensors()
    changed = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in change.items()}
    with pytest.raises(TidarError, match=message):
        chain.chain(**(given | changed))


def test_more_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TidarError, match="0 rows of 3 drafts"):
        Shortlists.for_step(0, 3, device=DEVICE)
    monkeypatch.setattr(chain, "TOKEN", triton.language.constexpr(300))
    with pytest.raises(TidarError, match="no vocabularies above 300"):
        chain.chain(**Case(vocab=301).tensors())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels import chain, chain_kernel
from tidar.kernels.reference_chain import DEALT, GROUPS, KEPT, lanes
dealt = dict(VOCAB={vocab}, GROUPS=GROUPS, LANES=lanes({vocab}), TOGETHER=chain.TOGETHER, KEPT=KEPT, DEALT=DEALT)
dealt |= dict(num_warps=chain.TOGETHER, STRIDE=16, FIRST=32, QUERIES=80, BESIDE={ranked})
follow = dict(KNOWN=0.9) if {ranked} else dict(KNOWN=0.9, choices=None, came_from=None, its_list=None, given=None)
follow |= dict(made_place=1, out_place=1, chance_place=1, **chain.sizes({rows}, {places}, KEPT * GROUPS, 256, {size}))
types = dict(base="*fp32", state="*fp32", first="*i64", made="*i8", token_table="*{dtype}", mix="*{dtype}",
    suppressed="*i1", temperature="*fp64", seed="*i64", lengths="*i32", out="*i64", tokens="*i32", scores="*fp32",
    noise="*fp32", following="*i64", choices="*fp32", came_from="*i32", arrived="*i32",
    chances="*fp32", chosen_rows="*i32", its_list="*i32", given="*i32", levels="*i64")
for kernel, fixed in ((chain_kernel.shortlist, dealt), (chain_kernel.follow, follow)):
    options = {{n: fixed.pop(n) for n in ("num_warps", "num_stages") if n in fixed}}
    fixed |= dict(SAMPLING={sampling}, PDL=1)
    names = kernel.arg_names
    kinds = {{n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}}
    aligned = [n for n in names if kinds[n].startswith("*") and n not in ("out", "made", "chances")]
    aligned += [n for n in ("base_row", "base_place", "state_row", "state_place") if n in names]
    even = {{(names.index(n),): [["tt.divisibility", 16]] for n in aligned}}
    source = ASTSource(kernel, kinds, {{(names.index(n),): v for n, v in fixed.items()}}, even)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    path = {path!r} + "/" + made.metadata.name
    open(path, "wb").write(made.asm["cubin"])
    ptx = made.asm["ptx"]
    before, behind = ptx.split("griddepcontrol.wait;")
    beside = fixed.get("BESIDE", False)
    kinds = "ld.global", "st.global", "cp.async", "atom.", "red."
    touched = [n for n in kinds if n in (behind if beside else before)]
    assert not touched, touched
    assert not beside or "cp.async.ca" not in ptx, "what others wrote is read past the L1 cache"
    print(path, made.metadata.shared, ptx.count("cp.async.cg"), ptx.count("wgmma.mma_async"), ptx.count("redux.sync"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize(
    ("vocab", "rows", "places", "dtype", "ranked"),
    [
        (4096, 2, 15, "bf16", False),
        (4096, 1, 15, "bf16", True),
        (4096, 2, 15, "bf16", True),
        (4096, 1, 63, "fp16", True),
        (4096, 1, 15, "fp32", True),
        (4096, 2, 15, "fp32", True),
        (151_936, 8, 3, "bf16", False),
    ],
)
def test_compiles_for_hopper_without_spilling(
    vocab: int, rows: int, places: int, dtype: str, ranked: bool, sampling: bool, tmp_path: Path
) -> None:
    given = {
        "vocab": vocab,
        "rows": rows,
        "places": places,
        "dtype": dtype,
        "ranked": ranked,
        "size": 4 if dtype == "fp32" else 2,
    }
    (tmp_path / "compile.py").write_text(COMPILE.format(**given, sampling=sampling, path=str(tmp_path)))
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

    def read(tool: str, option: str, path: str) -> str:
        return subprocess.run([f"{tools}/{tool}", option, path], capture_output=True, text=True).stdout

    (lists, *listed), (follow, *followed) = (line.split() for line in done.stdout.splitlines())
    for path in (lists, follow):
        assert " STACK:0 " in (used := read("cuobjdump", "--dump-resource-usage", path)), used
    (_, _, _, best), (shared, copies, products, _) = (map(int, numbers) for numbers in (listed, followed))
    assert best == 16, "the best of a group in two instructions, 8 times"
    # Logarithms in float64 are slow: a thread computes noise for one token, and where there is none, for none.
    assert (0 < read("nvdisasm", "-c", lists).count("DFMA") < 200) == sampling
    assert shared <= 227 * 1024 and copies > 0
    assert (products > 0) == (dtype != "fp32" and rows * places > 16), "Hopper's matrix instructions"
    # The memory order of the counter: successors are stored before it is added to, and look-ups, which go through the
    # L1 cache, find there no line that is older.
    code = read("nvdisasm", "-c", follow)
    order = [code.index(name) for name in ("MEMBAR.ALL.GPU", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL")]
    order.append(code.index("LDG.E.128", order[-1]))
    assert order == sorted(order)
