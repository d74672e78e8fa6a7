"""The kernel that chooses drafts one after another: against its plain twin, and the twin against the transition."""

from __future__ import annotations

import inspect
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_transition import PROMPTS, with_transition
from torch import Tensor
from torch.nn.functional import rms_norm

from tidar.config import SamplingParams
from tidar.decode.tidar import TidarDecoder
from tidar.errors import TidarError
from tidar.kernels import reference_chain
from tidar.noise import gumbel

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from test_kernels import _bfloat16_in_the_interpreter  # noqa: E402, F401

from tidar.kernels import chain  # noqa: E402
from tidar.kernels.chain import Exchange  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """A block of drafts to choose. Without a GPU, programs that wait for one another must not be more than one."""

    rows: int = 2
    places: int = 5
    vocab: int = 77
    width: int = 24
    temperature: tuple[float, ...] = (0.0,)
    programs: int = 1
    dtype: torch.dtype = torch.float32

    def tensors(self, seed: int = 0) -> dict[str, Any]:
        """Arguments of `chain`; logits and states are views of wider tensors, with garbage around them."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw)

        def within(values: Tensor) -> Tensor:
            wide = torch.full((values.shape[0], values.shape[1] + 2, values.shape[2] + 3), torch.nan)
            wide[:, 1:-1, : values.shape[2]] = values
            return wide.to(DEVICE)[:, 1:-1, : values.shape[2]]

        shape = self.rows, self.places
        heats = [self.temperature[row % len(self.temperature)] for row in range(self.rows)]
        made = {
            "first": torch.randint(self.vocab, (self.rows,), generator=draw),
            "made": torch.rand(shape, generator=draw) < 0.8,
            "token_table": normal(self.vocab, self.width).to(self.dtype),
            "mix": (normal(self.vocab, self.width) * self.width**-0.5 * 2).to(self.dtype),
            "suppressed": torch.rand(self.vocab, generator=draw) < 0.2,
            "temperature": torch.tensor(heats, dtype=torch.float64),
            "seed": torch.randint(2**62, (self.rows,), generator=draw),
            "lengths": torch.randint(5000, (self.rows,), generator=draw).int(),
        }
        placed: dict[str, Any] = {name: tensor.to(DEVICE) for name, tensor in made.items()}
        placed |= {"base": within(normal(*shape, self.vocab)), "state": within(normal(*shape, self.width))}
        return placed | {"offset": 1 + seed, "sampling": any(heat > 0 for heat in heats)}

    def exchange(self) -> Exchange:
        return Exchange.for_step(self.rows, self.places, self.vocab, programs=self.programs, device=DEVICE)


def computed(case: Case, given: dict[str, Any], exchange: Exchange | None = None) -> Tensor:
    """Written where the decoder wants it, beside the certain tokens; every element, and nothing else."""
    drafts = torch.full((case.rows, case.places + 2), -7, device=DEVICE)
    drafts[:, 0] = given["first"]
    out = drafts[:, 1:-1]
    done = chain.chain(**{**given, "first": drafts[:, 0]}, out=out, exchange=exchange or case.exchange())
    assert done is out
    assert torch.equal(drafts[:, 0], given["first"]) and (drafts[:, -1] == -7).all()
    return out


# --- the twin against the decoder ---


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}])
def test_twin_is_the_transition(options: dict[str, float], converted: Callable[[str], Path]) -> None:
    model = with_transition(converted("llama"))
    parts = model.transition
    assert parts is not None
    params = [SamplingParams(seed=5, **options), SamplingParams(seed=6), SamplingParams(seed=7, **options)]  # type: ignore[arg-type]
    decoder = TidarDecoder(model, draft_len=8)
    with torch.inference_mode():
        first = torch.tensor(decoder.prefill(PROMPTS, params))
        hidden = torch.randn(3, 7, 32, dtype=torch.float64)
        made = torch.rand(3, 7) < 0.8
        embedding = model.embedding
        suppressed = torch.zeros(model.vocab_size, dtype=torch.bool)
        suppressed[list(model.suppressed)] = True
        found = reference_chain.chain(
            model.head(hidden),
            parts.state(rms_norm(hidden, (32,))),
            first[:, 0],
            made,
            parts.token(rms_norm(embedding, embedding.shape[-1:])),
            model.hf.get_output_embeddings().weight @ parts.out.weight,
            suppressed,
            temperature=decoder.params.temperature,
            seed=decoder.params.seed,
            lengths=decoder.lengths.int(),
            offset=1,
            sampling=decoder.params.any_sampling,
        )
        assert torch.equal(found, decoder._next_drafts(first, hidden, made)[:, 1:])


# --- the kernel against the twin ---


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the others are there")
def test_a_word_that_never_comes_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that run one after another: the first waits for what the second has not said."""
    monkeypatch.setattr(chain, "PATIENCE", triton.language.constexpr(3))
    case = Case(programs=2)
    drafts = computed(case, case.tensors(0))
    assert ((drafts >= 0) & (drafts < case.vocab)).all()


CASES = {
    "one row": Case(rows=1),
    "one row, one place": Case(rows=1, places=1),
    "rows for a matrix unit": Case(rows=2),
    "two groups": Case(rows=17, programs=2),
    "31 places": Case(rows=1, places=31),
    "a token more than a tile": Case(vocab=65),
    "a whole tile": Case(vocab=64, width=32),
    "a narrow gate": Case(rows=1, width=3),
    "a wide gate": Case(vocab=40, width=130),
    "sampled": Case(rows=1, temperature=(0.7,)),
    "sampled and greedy": Case(rows=5, temperature=(0.7, 0.0, 1.3)),
    "next to no temperature": Case(rows=2, temperature=(1e-30, 1e-320)),
    "float16": Case(rows=3, temperature=(0.7, 0.0), dtype=torch.float16),
    "bfloat16": Case(rows=3, temperature=(0.7, 0.0), dtype=torch.bfloat16),
    "one row, bfloat16": Case(rows=1, temperature=(0.9,), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_kernel_is_the_twin(case: Case) -> None:
    exchange = case.exchange()
    for seed in range(4):
        given = case.tensors(seed)
        drafts = computed(case, given, exchange)
        assert follows(given, drafts)
        if DEVICE == "cpu":  # where no other order of sums, nor another exponential, decides near ties
            assert torch.equal(drafts, reference_chain.chain(**given))


@pytest.mark.parametrize("rows", [1, 2])
def test_ties_go_to_the_lowest_token(rows: int) -> None:
    case = Case(rows=rows, places=4)
    given = case.tensors()
    given["mix"].zero_()
    given["made"].fill_(True)
    given["suppressed"] = torch.arange(case.vocab, device=DEVICE) < 3
    given["base"].fill_(-1.5)
    given["base"][:, 1] = torch.tensor([-0.0, 0.0], device=DEVICE).repeat(50)[: case.vocab].roll(1)
    given["base"][:, 2, :20], given["base"][:, 2, 20:] = -2.0, -torch.inf
    given["base"][:, 3] = -torch.inf
    assert computed(case, given).tolist() == [[3, 3, 3, 0]] * rows


def test_nan_neither_hangs_nor_stays() -> None:
    case = Case(rows=2, places=3)
    given = case.tensors()
    exchange, wanted = case.exchange(), reference_chain.chain(**given)
    spoilt = given["base"].clone().fill_(torch.nan)
    drafts = computed(case, given | {"base": spoilt}, exchange)
    assert ((drafts >= 0) & (drafts < case.vocab)).all()
    assert torch.equal(computed(case, given, exchange), wanted)


def test_a_draft_that_nobody_made_is_not_read() -> None:
    case = Case(rows=2, temperature=(0.7,))
    given = case.tensors()
    wanted = reference_chain.chain(**given)
    given["base"][~given["made"]] = torch.nan
    given["state"][~given["made"]] = torch.nan
    assert not given["made"].all() and torch.equal(computed(case, given), wanted)


def test_memory_made_anew() -> None:
    case = Case(rows=1, temperature=(1.0,))
    given = case.tensors()
    given["made"] = given["made"].to(torch.int8)
    assert follows(given, chain.chain(**given))


# --- programs that wait for one another ---


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs of the interpreter in threads of their own, some of them late, rather than one after another."""
    if DEVICE == "cuda":
        pytest.skip("the GPU runs them side by side by itself")
    from triton.runtime import interpreter

    own, late = threading.local(), random.Random(0)
    builder = interpreter.InterpreterBuilder
    atomic = builder.create_atomic_rmw

    def program_id(self: Any, axis: int) -> Any:
        return interpreter.TensorHandle(torch.tensor([own.at[axis]], dtype=torch.int32).numpy(), triton.language.int32)

    def publish(self: Any, *given: Any) -> Any:
        time.sleep(late.choice([0, 0, 0.001, 0.01]))
        return atomic(self, *given)

    class Threads(interpreter.GridExecutor):  # type: ignore[misc]
        def __call__(self, *given: Any, **named: Any) -> None:
            named = {n: v for n, v in named.items() if n in inspect.getfullargspec(self.fn).args}
            scope = interpreter._patch_lang(self.fn)
            bound = inspect.getcallargs(self.fn, *given, **named)
            bound = {n: v if n in self.constexprs else interpreter._implicit_cvt(v) for n, v in bound.items()}
            failed: list[Exception] = []

            def run(*at: int) -> None:
                own.at = at
                try:
                    self.fn(**bound)
                except Exception as error:  # a thread's would be lost
                    failed.append(error)

            threads = [
                threading.Thread(target=run, args=(x, y, 0), daemon=True)
                for x in range(self.grid[0])
                for y in range(self.grid[1])
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            scope.restore()
            assert not failed and not any(thread.is_alive() for thread in threads), failed

    monkeypatch.setattr(builder, "create_get_program_id", program_id)
    monkeypatch.setattr(builder, "create_atomic_rmw", publish)
    monkeypatch.setattr(interpreter, "GridExecutor", Threads)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


SHARED = {
    "one row": Case(rows=1, vocab=64, programs=4, temperature=(0.8,)),
    "programs no power of 2": Case(rows=2, vocab=40, programs=3),
    "two groups": Case(rows=17, places=3, vocab=32, programs=4),
}


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED.keys())
def test_programs_side_by_side(case: Case, side_by_side: None) -> None:
    """Launch after launch in one memory: what the launch before left there must not be taken for an answer."""
    exchange = case.exchange()
    assert exchange.words.shape[2] == case.programs // -(-case.rows // exchange.rows) > 1
    for seed in range(5):
        given = case.tensors(seed)
        assert torch.equal(computed(case, given, exchange), reference_chain.chain(**given)), f"launch {seed}"
        assert (exchange.words & 1 == 1 - seed % 2).all(), "each word is written once in a launch"


def test_a_stale_word_taken_for_new_is_caught(side_by_side: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same memory, but nobody looks at the parity."""
    case = SHARED["one row"]
    exchange = case.exchange()
    computed(case, case.tensors(0), exchange)
    monkeypatch.setattr(triton.language, "max", impatient(triton.language.max))
    wrong = [
        not torch.equal(computed(case, given, exchange), reference_chain.chain(**given))
        for given in (case.tensors(seed) for seed in range(1, 4))
    ]
    assert any(wrong)


def impatient(right: Callable[..., Any]) -> Callable[..., Any]:
    """A maximum that finds nothing to wait for: only the wait takes one over all axes."""

    def wrong(values: Any, axis: int | None = None, **rest: Any) -> Any:
        return right(values, axis, **rest) if axis is not None else 0

    return wrong


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("programs", [1, 32, 64, 128])
@pytest.mark.parametrize("rows", [1, 2, 8, 40])
def test_on_a_gpu(rows: int, programs: int, dtype: torch.dtype) -> None:
    """Many launches and replays of a graph with fresh inputs, alternately, in one memory."""
    programs = max(programs, -(-rows // 16))
    whole = programs // -(-rows // 16) >= 32 and dtype == torch.bfloat16
    sizes = {"vocab": 4096, "width": 256} if whole else {"vocab": 300, "width": 40}
    case = Case(rows=rows, places=15, temperature=(0.8, 0.0), programs=programs, dtype=dtype, **sizes)
    held, exchange = case.tensors(), case.exchange()
    out = torch.empty(rows, 15, dtype=torch.int64, device=DEVICE)

    def run() -> None:
        chain.chain(**held, out=out, exchange=exchange)

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
        for call in (graph.replay, run)[seed % 3 == 0 :]:
            out.fill_(-7)
            call()
            assert follows(held, out), f"launch {seed}"


def follows(given: dict[str, Any], drafts: Tensor) -> bool:
    """Each draft is the best behind the one before it, up to rounding: of the gate's, too, in 16 bits."""
    before, right = given["first"], True
    tables = given["token_table"], given["mix"], given["suppressed"]
    for place in range(drafts.shape[1]):
        scores = reference_chain.score(given["base"][:, place].double(), given["state"][:, place], before, *tables)
        position = given["lengths"].long()[:, None] + given["offset"] + place
        scores += given["temperature"][:, None] * gumbel(given["seed"], position, scores.shape[1])[:, 0]
        before, made = drafts[:, place], given["made"][:, place].bool()
        near = scores.gather(1, before[:, None])[:, 0] > scores.amax(1) - (1e-2 if tables[1].itemsize == 2 else 1e-4)
        right &= bool(torch.where(made, near, before == 0).all())
    return right


# --- sizes and mistakes ---


def test_sizes() -> None:
    def sizes(*given: int, **options: int) -> tuple[Any, ...]:
        made = Exchange.for_step(*given, device="cpu", **options)
        return tuple(made.words.shape), made.rows, made.tile

    assert sizes(1, 15, 4096, programs=128) == ((15, 1, 128), 1, 32)
    assert sizes(8, 15, 4096, programs=64) == ((15, 8, 64), 16, 64)
    assert sizes(64, 15, 4096, programs=128) == ((15, 64, 32), 16, 128), "four groups of 32"
    assert sizes(1, 15, 4100, programs=128) == ((15, 1, 65), 1, 64), "no programs without tokens"
    assert sizes(1, 1, 3, programs=128) == ((1, 1, 1), 1, 16)
    assert sizes(33, 2, 100) == ((2, 33, 1), 16, 128), "without a GPU no program waits"
    with pytest.raises(TidarError, match="too many"):
        sizes(33, 1, 3, programs=2)
    with pytest.raises(TidarError, match="at least 1"):
        sizes(0, 1, 3)
    assert [chain.warps(n * 1024) for n in (1, 8, 16, 32)] == [4, 4, 8, 16]


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
    "temperature": ({"temperature": torch.zeros(3)}, "temperature"),
    "first": ({"first": torch.zeros(2, 1, dtype=torch.int64)}, "first"),
    "seed": ({"seed": torch.zeros(2, dtype=torch.int32)}, "seed"),
    "lengths": ({"lengths": torch.zeros(2, dtype=torch.int64)}, "int32"),
    "out": ({"out": torch.zeros(2, 5, dtype=torch.int32)}, "out must be"),
    "exchange": ({"exchange": Exchange.for_step(2, 4, 77, device="cpu")}, "exchange"),
    "too large": (
        {"exchange": Exchange.for_step(2, 5, 77, programs=1, device="cpu"), "width": 260},
        "too many for a program",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(change: dict[str, Any], message: str) -> None:
    case = Case(width=change.get("width", 24))
    given: dict[str, Any] = {"out": None, "exchange": None} | case.tensors()
    changed = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in change.items() if n != "width"}
    if isinstance(held := change.get("exchange"), Exchange):
        changed["exchange"] = Exchange(held.words.to(DEVICE), held.rows, held.tile)
    with pytest.raises(TidarError, match=message):
        chain.chain(**(given | changed))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels import chain
from tidar.kernels.chain import Exchange
made = Exchange.for_step({rows}, 15, {vocab}, programs={programs}, device="cpu")
names, slots = chain._chain.arg_names, made.words.shape[2]
fixed = dict(BATCH={rows}, PLACES=15, VOCAB={vocab}, W=256, SAMPLING={sampling}, ROWS=made.rows, TILE=made.tile,
    WIDTH=256, PROGRAMS=slots, SLOTS=slots, offset=1, made_place=1, out_place=1)
types = dict(base="*fp32", state="*fp32", first="*i64", made="*i1", token_table="*{dtype}", mix="*{dtype}",
    suppressed="*i1", temperature="*fp64", seed="*i64", lengths="*i32", out="*i64", words="*i64")
types = {{n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}}
aligned = [n for n in names if types[n].startswith("*") and n != "out"]
aligned += ["base_row", "base_place", "state_row", "state_place"]
even = {{(names.index(n),): [["tt.divisibility", 16]] for n in aligned}}
source = ASTSource(chain._chain, types, {{(names.index(n),): v for n, v in fixed.items()}}, even)
options = dict(num_warps=chain.warps(made.tile * 256), num_stages=1, launch_cooperative_grid=True)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
open({path!r}, "wb").write(compiled.asm["cubin"])
open({path!r} + ".ptx", "w").write(compiled.asm["ptx"])
print(compiled.metadata.shared, compiled.metadata.launch_cooperative_grid)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab", "programs", "dtype"),
    [(1, 4096, 64, "bf16"), (1, 4096, 128, "bf16"), (8, 4096, 64, "bf16"), (8, 4096, 128, "bf16")]
    + [(64, 4096, 128, "bf16"), (1, 4096, 128, "fp32"), (8, 4096, 128, "fp32")],
)
def test_compiles_for_hopper_without_spilling(
    rows: int, vocab: int, programs: int, dtype: str, sampling: bool, tmp_path: Path
) -> None:
    cubin = tmp_path / "cubin"
    given = {"rows": rows, "vocab": vocab, "programs": programs, "dtype": dtype, "sampling": sampling}
    (tmp_path / "compile.py").write_text(COMPILE.format(**given, path=str(cubin)))
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared, cooperative = done.stdout.split()
    assert int(shared) <= 227 * 1024 and cooperative == "True"
    ptx = (tmp_path / "cubin.ptx").read_text()
    before, _, places = ptx.partition("Loop Header: Depth=1")
    assert "ld.global.v4.b32" in before, "the slice of the table is read ahead of the places"
    assert "atom.global.gpu.relaxed.exch.b64" in places and "ld.volatile.global" in places
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    used = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True).stdout
    stack = re.search(r" STACK:(\d+) ", used)
    assert stack and int(stack[1]) <= 8, used  # two words, spilled while the slice is read
