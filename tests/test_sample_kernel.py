"""The sampling kernel against `tidar.sampling`, token for token; in Triton's interpreter without a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tidar import noise
from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.fast.plain_sample import sample as plain
from tidar.kernels.params import DeviceParams
from tidar.sampling import RowParams, process, sample, seen_after

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
import triton.language as tl  # noqa: E402

from tidar.kernels import sample as kernel  # noqa: E402
from tidar.kernels.noise import gumbel, words  # noqa: E402

# Temperatures near 0 make scores infinite, in the interpreter with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in divide:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.3, top_k=7, seed=2),
    SamplingParams(temperature=1.0, top_p=0.9, seed=3),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=4),
    SamplingParams(temperature=2.0, top_k=10_000, top_p=0.3, repetition_penalty=0.8, seed=2**63 - 1),
    SamplingParams(temperature=0.5, top_k=1, seed=5),
    SamplingParams(top_k=3, top_p=0.5, seed=6),  # greedy: filters change nothing
    SamplingParams(temperature=1.5, top_k=20, top_p=0.5, seed=7),
    SamplingParams(temperature=1e-320, top_p=0.1, seed=8),
]


@dataclass
class Case:
    """A call of the sampler: B rows of ``params``, and what they sample from."""

    logits: Tensor
    params: list[SamplingParams]
    seed: int = 0
    suppression: bool = False
    penalty: bool = False
    drafted: bool = True
    first: int = 1
    others: int = 0
    pairs: int = 0
    made: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        rows, places, vocab = self.logits.shape
        draw = torch.Generator().manual_seed(self.seed)
        suppressed = torch.rand(vocab, generator=draw) < 0.1
        suppressed[int(torch.randint(vocab, (), generator=draw))] = False
        seen, drafts = (
            torch.rand(rows, vocab, generator=draw) < 0.3,
            torch.randint(vocab, (rows, places + 2), generator=draw),
        )
        lengths = torch.randint(2000, (rows,), generator=draw).int()
        self.made = {
            "lengths": lengths,
            "suppressed": suppressed if self.suppression else None,
            "seen": seen if self.penalty else None,
            "drafts": drafts if self.penalty and self.drafted else None,
        }
        if self.others:
            levels = torch.randint(1, places - self.others + 1, (rows, self.others + 3), generator=draw)
            self.made["others"] = levels[:, : self.others]

    def wanted(self) -> Tensor:
        """By the functions that the kernel replaces."""
        rows, places = replace(RowParams.of(self.params), any_penalty=self.penalty), self.logits.shape[1]
        logits, seen, drafts = self.logits, self.made["seen"], self.made["drafts"]
        if self.suppression:
            logits = logits.masked_fill(self.made["suppressed"], -torch.inf)
        if seen is not None:
            seen = seen[:, None] if drafts is None else seen_after(seen, drafts[:, :places])
        place = torch.arange(places).expand(len(logits), places).clone()
        if self.others:
            levels, count = self.made["others"], places - self.others
            place[:, count:] = levels
            place[:, count + 1 : count + 2 * self.pairs : 2] += 1
            if seen is not None:
                alone = self.made["seen"][:, None]
                after = torch.cat([alone, seen[:, :count].expand(-1, count, -1)], 1)
                told = [after[row, levels[row]] for row in range(len(logits))]
                seen = torch.cat([after[:, 1:], torch.stack(told)], 1)
        positions = self.made["lengths"].long()[:, None] + self.first + place
        return sample(process(logits, rows, seen), rows, positions)

    def computed(self, chunk: int | None = None, **options: Any) -> Tensor:
        rows = RowParams.of(self.params)
        given: dict[str, Any] = {n: None if t is None else t.to(DEVICE) for n, t in self.made.items()}
        given |= {"sampling": rows.any_sampling, "filtering": rows.any_filter, "first": self.first}
        given |= {"pairs": self.pairs} if self.others else {}
        given |= {"out": torch.full(self.logits.shape[:2], -(10**9), device=DEVICE)} | options
        logits = self.logits.to(DEVICE)
        before = logits.clone()
        done = kernel.sample(logits, DeviceParams.of(self.params, DEVICE), **given, chunk=chunk)
        assert done is given["out"] or given["out"] is None
        assert torch.equal(logits.nan_to_num(), before.nan_to_num())
        return done.cpu()


def random_logits(kind: str, rows: int, places: int, vocab: int, seed: int = 0) -> Tensor:
    x = torch.randn(rows, places, vocab, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "usual":
            return 3 * x
        case "flat":
            return x / 10
        case "peaked":
            return 20 * x
        case "ties":
            return (2 * x).round() + 40
        case _:
            return torch.zeros_like(x)


@pytest.mark.parametrize("penalty", [False, True])
@pytest.mark.parametrize("vocab", [60, 9000])
@pytest.mark.parametrize("params", [MIXED[:2], MIXED[2:7]], ids=["greedy", "mixed"])
def test_alternates_are_sampled_where_they_stand(params: list[SamplingParams], vocab: int, penalty: bool) -> None:
    """With the noise of the position behind them, after as many drafts as they follow; by both twins."""
    case = Case(random_logits("flat", len(params), 9, vocab), params, penalty=penalty, others=5, pairs=2)
    wanted = case.wanted()
    assert torch.equal(case.computed(), wanted)
    rows = RowParams.of(params)
    flags: dict[str, Any] = {"sampling": rows.any_sampling, "filtering": rows.any_filter}
    made = {name: each for name, each in case.made.items() if name != "lengths"}
    if penalty:
        made["drafts"] = made["drafts"][:, :4]
    device = DeviceParams.of(params, torch.device("cpu"))
    found = plain(case.logits, device, case.made["lengths"], first=1, pairs=2, **made, **flags)
    assert torch.equal(found, wanted)


def noise_of(  # type: ignore[no-untyped-def]  # on a GPU Triton would look for Any
    seeds, positions, out, ROWS: tl.constexpr, TOKENS: tl.constexpr, STREAM: tl.constexpr
):
    row, token = tl.arange(0, ROWS), tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    quad = tl.program_id(0) * (TOKENS // 4) + tl.arange(0, TOKENS // 4)
    made = gumbel(words(tl.load(seeds + row)[:, None], tl.load(positions + row)[:, None], quad[None, :], STREAM))
    tl.store(out + (row * TOKENS * tl.num_programs(0))[:, None] + token[None, :], made)
    one = gumbel(words(tl.load(seeds), tl.load(positions), quad, STREAM))
    tl.store(out + ROWS * TOKENS * tl.num_programs(0) + token, one)


@pytest.mark.parametrize("stream", [noise.SAMPLE, noise.DRAFT])
def test_noise_has_the_same_bits(stream: int) -> None:
    seeds = torch.tensor([0x1234_5678_9ABC, 0, 2**63 - 1, 5], device=DEVICE)
    positions = torch.tensor([2**40 + 3, 0, 2**32 - 1, 2**32], device=DEVICE)
    out = torch.full((5, 16384), torch.nan, device=DEVICE)
    triton.jit(noise_of)[(4,)](seeds, positions, out, 4, 4096, stream)
    wanted = noise.gumbel(seeds.cpu(), positions.cpu()[:, None], 16384, stream=stream)[:, 0]
    assert torch.equal(out[:4].cpu(), wanted)
    assert torch.equal(out[4].cpu(), wanted[0])


@pytest.mark.parametrize("kind", ["usual", "flat", "peaked", "ties", "equal"])
@pytest.mark.parametrize(
    ("vocab", "chunk"),
    [(4, None), (37, None), (37, 16), (1003, 256), (4096, None), (8190, None), (9001, None)],
)
def test_tokens_are_those_of_sampling(vocab: int, chunk: int | None, kind: str) -> None:
    penalty = kind != "peaked"
    logits = random_logits(kind, len(MIXED), 1, vocab, vocab)
    case = Case(logits, MIXED, seed=vocab, suppression=penalty, penalty=penalty)
    assert torch.equal(case.computed(chunk), case.wanted())


@pytest.mark.parametrize("kind", ["usual", "ties", "equal"])
@pytest.mark.parametrize("penalty", [False, True])
def test_greedy_in_chunks(kind: str, penalty: bool) -> None:
    """Programs share a row: of equals in different chunks the first wins."""
    greedy = [SamplingParams(repetition_penalty=1.3 if penalty else 1.0)] * 3
    case = Case(random_logits(kind, 3, 2, 1003), greedy, suppression=True, penalty=penalty)
    assert torch.equal(case.computed(64), case.wanted())
    if kind == "equal":
        assert (case.logits == case.logits[0, 0, 0]).all(), "equals in all chunks"


def test_a_large_vocabulary() -> None:
    mixed = MIXED[3:6]
    case = Case(random_logits("usual", len(mixed), 1, 151_936), mixed, suppression=True, penalty=True, first=0)
    assert torch.equal(case.computed(), case.wanted())


@pytest.mark.parametrize("params", [MIXED[i] for i in (0, 1, 2, 3, 4, 9)])
def test_one_request_alone(params: SamplingParams) -> None:
    """What its parameters do not need is compiled away; the other requests change nothing."""
    logits = random_logits("ties", 1, 6, 90)
    case = Case(logits, [params], penalty=True)
    wanted = case.wanted()
    for chunk in (None, 64):
        assert torch.equal(case.computed(chunk), wanted)
        assert torch.equal(case.computed(chunk, sampling=True, filtering=True), wanted)
    without_drafts = Case(logits, [params], penalty=True, drafted=False)
    assert torch.equal(without_drafts.computed(), without_drafts.wanted())


def masses(logits: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities that top-p adds up, running: (V,) float64."""
    ranked = (logits.double() / params.temperature).softmax(-1).sort(descending=True).values
    ranked = ranked[: params.top_k or None]
    return (ranked / ranked.sum()).cumsum(0)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_tokens_are_those_of_sampling_anywhere(data: st.DataObject) -> None:
    """Few different logits, so ties everywhere: among the best, at the last of top-k, at the last of top-p."""
    values = data.draw(st.lists(st.integers(-9, 3), min_size=4, max_size=40))
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0, 1.7, 30.0])),
        top_k=data.draw(st.integers(0, len(values) + 1)),
        top_p=data.draw(st.sampled_from([1e-9, 0.05, 0.31, 0.5, 0.77, 0.99, 1.0])),
        seed=data.draw(st.integers(0, 2**63 - 1)),
    )
    logits = torch.tensor(values, dtype=torch.float32) / 2
    if params.temperature > 0:
        assume(params.top_p == 1 or float((masses(logits, params) - params.top_p).abs().min()) > 1e-5)
    case = Case(logits.expand(1, 2, -1), [params], seed=data.draw(st.integers(0, 99)))
    assert torch.equal(case.computed(data.draw(st.sampled_from([None, 16]))), case.wanted())


def test_top_p_at_its_edges() -> None:
    """The very tokens that may be drawn, of equals, where halves and tenths add up exactly."""
    for top_p, kept in ((0.3, 3), (0.31, 4), (0.8, 8), (1 - 1e-9, 10), (1e-60, 1)):
        case = Case(torch.zeros(1, 40, 10), [SamplingParams(temperature=1.0, top_p=top_p)])
        tokens = case.computed()
        assert set(tokens.flatten().tolist()) == set(range(kept)), top_p
        if top_p > 1e-45:  # below, float32 has no such number and `process` keeps nothing
            assert torch.equal(tokens, case.wanted())


@pytest.mark.parametrize("together", [True, False])
def test_top_k_wherever_the_best_tokens_are(together: bool) -> None:
    """Many in one lane of a chunk, which is as wrong as the first guess of the search can be; and none together."""
    vocab, lanes, best = 320, 32, 10
    logits = torch.randn(1, 1, vocab, generator=torch.Generator().manual_seed(0))
    logits[..., 3 :: lanes if together else lanes - 1][..., :best] += 10
    for k in (1, 2, 9, 10, 11, 31, 100, 319, 320):
        params = [SamplingParams(temperature=50.0, top_k=k, top_p=top_p, seed=k) for top_p in (1.0, 0.6)]
        case = Case(logits.expand(2, 1, -1), params)
        assert torch.equal(case.computed(lanes), case.wanted()), k


def test_drafts_are_kept_from_repetition() -> None:
    """A penalty takes each row's drafts for seen, and not those after it."""
    case = Case(torch.zeros(1, 4, 8) + 1, [SamplingParams(repetition_penalty=9.0)], penalty=True)
    case.made |= {"seen": torch.tensor([[True] + 7 * [False]]), "drafts": torch.tensor([[1, 3, 2, 4]])}
    assert case.computed().tolist() == [[2, 2, 4, 5]]


def test_noise_follows_seed_and_position() -> None:
    logits, params = torch.zeros(2, 14, 200), [SamplingParams(temperature=1.0, seed=seed) for seed in (1, 2)]
    case = Case(logits, params)
    case.made["lengths"] = torch.tensor([50, 40], dtype=torch.int32)
    tokens = case.computed()
    assert torch.equal(case.computed(64), tokens)
    case.first = 11
    later = case.computed()
    assert torch.equal(later[:, :-10], tokens[:, 10:])
    assert not torch.equal(later, tokens)
    case.params = params[::-1]
    assert not torch.equal(case.computed(), later)


def test_strided_tensors() -> None:
    case = Case(random_logits("usual", len(MIXED), 3, 100), MIXED, penalty=True)
    wanted = case.wanted()
    wide = torch.full((len(MIXED), 7, 130), torch.nan)
    wide[:, 1::2, :100] = case.logits
    case.logits = wide[:, 1::2, :100]
    case.made["seen"] = torch.cat([case.made["seen"], ~case.made["seen"]], 1)[:, :100]
    case.made["drafts"] = torch.cat([case.made["drafts"], case.made["drafts"]], 1)[:, :4]
    assert torch.equal(case.computed(), wanted)
    assert torch.equal(case.computed(out=None), wanted)


@pytest.mark.parametrize("params", [MIXED[:2], MIXED[2:6]], ids=["greedy", "mixed"])
@pytest.mark.parametrize("chunk", [None, 64])
def test_chosen_rows(params: list[SamplingParams], chunk: int | None) -> None:
    """Any of some logits, one more than once, are what would have been copied; by both twins."""
    logits = random_logits("usual", 1, 19, 200)[0]
    rows = torch.randint(19, (len(params), 3), generator=torch.Generator().manual_seed(0)).int()
    rows[0] = torch.tensor([18, 4, 18])
    case = Case(logits[rows.long()], params, penalty=True)
    wanted = case.wanted()
    case.logits = logits
    out = torch.empty(rows.shape, dtype=torch.int64, device=DEVICE)
    assert torch.equal(case.computed(chunk, rows=rows.to(DEVICE), out=out), wanted)
    flags = RowParams.of(params)
    device, made = DeviceParams.of(params), case.made | {"drafts": case.made["drafts"][:, :3]}
    options: dict[str, Any] = {"first": 1, "sampling": flags.any_sampling, "filtering": flags.any_filter}
    lengths = made.pop("lengths")
    assert torch.equal(plain(logits, device, lengths, rows=rows, **made, **options), wanted)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("chunk", [None, 64])
def test_bad_logits_are_reported(broken: float, chunk: int | None) -> None:
    params = MIXED[:6]
    logits = random_logits("usual", len(params), 2, 100)
    case = Case(logits, params, penalty=True)
    wanted, bad = case.wanted(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(case.computed(chunk, bad=bad), wanted)
    assert not bad.any()
    case.logits = logits.clone()
    case.logits[3, 1, 57] = case.logits[0, 1, 99] = broken
    case.logits[5, 0] = -torch.inf
    wanted[3, 1] = wanted[0, 1] = wanted[5, 0] = 0
    assert torch.equal(case.computed(chunk, bad=bad), wanted)
    assert bad.tolist() == [1]
    case.logits = logits[:, :1]
    case.computed(chunk, bad=bad)
    assert bad.tolist() == [1]  # until the host has seen it
    case.logits = torch.full((6, 1, 100), broken)
    assert not case.computed(chunk).any()


def test_bad_logits_of_suppressed_tokens_are_no_matter() -> None:
    case = Case(random_logits("usual", len(MIXED), 1, 100), MIXED, suppression=True)
    wanted, bad = case.wanted(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    case.logits[..., case.made["suppressed"]] = torch.nan
    assert torch.equal(case.computed(bad=bad), wanted)
    assert not bad.any()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("vocab", [4096, 151_936])
def test_a_captured_call_follows_its_inputs(vocab: int) -> None:
    cases = [Case(random_logits("usual", len(MIXED), 4, vocab, seed), MIXED, seed, penalty=True) for seed in range(3)]
    cases[1].params = MIXED[::-1]
    case = cases[0]
    given: dict[str, Any] = {n: None if t is None else t.to(DEVICE) for n, t in case.made.items()}
    logits, params = case.logits.to(DEVICE), DeviceParams.of(MIXED, DEVICE)
    out = torch.empty(logits.shape[:2], dtype=torch.int64, device=DEVICE)

    def run() -> None:
        kernel.sample(logits, params, **given, first=1, sampling=True, filtering=True, out=out)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for other in cases:
        logits.copy_(other.logits)
        params.copy_(DeviceParams.of(other.params, DEVICE))
        for name, tensor in given.items():
            if tensor is not None:
                tensor.copy_(other.made[name])
        out.fill_(-1)
        graph.replay()
        assert torch.equal(out.cpu(), other.wanted())


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"logits": torch.zeros(2, 3, 10).double()}, "float32"),
    "stride": ({"logits": torch.zeros(2, 10, 3).mT}, "contiguous"),
    "rows": ({"params": DeviceParams.of(MIXED[:3], DEVICE)}, "parameters"),
    "others of numbers": ({"others": torch.zeros(2, 1, dtype=torch.int32)}, "others must be int64"),
    "others of few": ({"others": torch.zeros(1, 1, dtype=torch.int64)}, "others must be int64"),
    "others only": ({"others": torch.zeros(2, 3, dtype=torch.int64)}, "3 rows are not drafts and 3 alternates"),
    "pairs": ({"others": torch.zeros(2, 1, dtype=torch.int64), "pairs": 1}, "begin with 1 pairs"),
    "lengths": ({"lengths": torch.zeros(2, dtype=torch.long)}, "lengths"),
    "suppressed": ({"suppressed": torch.zeros(9, dtype=torch.bool)}, "suppressed"),
    "seen": ({"seen": torch.zeros(2, 10)}, "seen"),
    "drafts": ({"drafts": torch.zeros(2, 2, dtype=torch.long)}, "drafts"),
    "bad": ({"bad": torch.zeros(1)}, "bad"),
    "out": ({"out": torch.zeros(2, 3)}, "out"),
    "chunk": ({"chunk": 24}, "power of 2"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(change: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"logits": torch.zeros(2, 3, 10), "params": DeviceParams.of(MIXED[:2], DEVICE)}
    right |= {"lengths": torch.zeros(2, dtype=torch.int32), "first": 0, "sampling": True, "filtering": True}
    with pytest.raises(TidarError, match=message):
        kernel.sample(**(right | change))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels import sample
from tidar.kernels.sample_kernel import draw
names = draw.arg_names
chunk = sample.chunk_of({vocab})
fixed = dict(VOCAB={vocab}, CHUNK=chunk, PLACES=16, PAIRS=5, SAMPLING=True, FILTERING=True, PDL=3)
fixed |= dict.fromkeys({absent}, None)
types = dict.fromkeys(("logits", "temperatures", "top_ps", "penalties"), "*fp32")
types |= dict.fromkeys(("rows", "lengths", "top_ks", "bad"), "*i32") | dict.fromkeys(("suppressed", "seen"), "*u8")
types |= dict.fromkeys(("seeds", "drafts", "places", "out"), "*i64")
types = {{n: "constexpr" if n in fixed else types.get(n, "i32") for n in names}}
even = {{(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith("*") or n[-4:] == "step"}}
source = ASTSource(draw, types, {{(names.index(n),): v for n, v in fixed.items()}}, even)
options = dict(num_warps=sample.warps(chunk), enable_fp_fusion=False)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
open({path!r}, "wb").write(made.asm["cubin"])
wait, go = (made.asm["ptx"].index("griddepcontrol." + name) for name in ("wait;", "launch_dependents;"))
assert wait < go, "what runs beside it finds all before it done"
print(made.metadata.shared, made.asm["ptx"].count("div.rn.f32"), made.asm["ptx"].count("div.full.f32"))
"""
"""The interpreter takes programs that the compiler does not; the compiler needs no GPU."""


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [4096, 151_936])
@pytest.mark.parametrize("absent", [(), ("seen", "drafts"), ("places", "rows")])
def test_compiles_for_hopper_without_spilling(vocab: int, absent: tuple[str, ...], tmp_path: Any) -> None:
    program = COMPILE.format(vocab=vocab, absent=absent, path=str(tmp_path / "cubin"))
    (tmp_path / "compile.py").write_text(program)
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shared, rounded, hasty = map(int, done.stdout.split())
    assert shared <= 100 * 1024
    assert rounded > 0 == hasty, "divisions are rounded as everywhere else"
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    used = subprocess.run([tool, "--dump-resource-usage", tmp_path / "cubin"], capture_output=True, text=True).stdout
    assert " STACK:0 " in used, used
