"""Drafts of their own logits, their chances and runners-up, against torch; in Triton's interpreter without a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tidar.config import SamplingParams
from tidar.errors import TidarError
from tidar.fast import plain_sample
from tidar.kernels.params import DeviceParams
from tidar.kernels.reference_step import Runners
from tidar.proposals import KNOWN, RUNNERS_UP
from tidar.sampling import RowParams

triton = pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
from test_sample_kernel import DEVICE, MIXED, random_logits  # noqa: E402

from tidar.kernels import draft as kernel  # noqa: E402
from tidar.kernels import sample as sampler  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in divide:RuntimeWarning")
UNTOUCHED = -7


@dataclass
class Case:
    """A call of B rows of ``params`` with R places."""

    params: list[SamplingParams]
    places: int = 5
    vocab: int = 90
    kind: str = "usual"
    seed: int = 0
    chosen: bool = True
    penalty: bool = False
    given: bool = True
    ranked: bool = True

    def tensors(self) -> dict[str, Any]:
        """What is read, on the device."""
        count, draw = len(self.params), torch.Generator().manual_seed(self.seed)
        logits = random_logits(self.kind, count, 2 * self.places, self.vocab, self.seed)
        rows = None
        if self.chosen:
            logits = logits.flatten(0, 1)
            rows = torch.randint(len(logits), (count, self.places), generator=draw).int()
        else:
            logits = logits[:, 1::2]  # strided
        suppressed = torch.rand(self.vocab, generator=draw) < 0.1
        made: dict[str, Any] = {
            "logits": logits,
            "lengths": torch.randint(2000, (count,), generator=draw).int(),
            "made": torch.rand(count, self.places, generator=draw) < 0.7,
            "suppressed": suppressed,
            "seen": torch.rand(count, self.vocab, generator=draw) < 0.3 if self.penalty else None,
            "rows": rows,
            "given": torch.randint(3, (count,), generator=draw).int() if self.given else None,
        }
        made = {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in made.items()}
        each = RowParams.of(self.params)
        made |= {"params": DeviceParams.of(self.params, DEVICE), "first": 1}
        return made | {"sampling": each.any_sampling, "filtering": each.any_filter}

    def results(self) -> dict[str, Any]:
        """What is written to, columns of wider memory."""
        count = len(self.params)
        drafts = torch.arange(count * (self.places + 3), device=DEVICE).view(count, -1) % self.vocab
        chances = torch.full((count, self.places + 3), float(UNTOUCHED), device=DEVICE)
        shape = count, self.places, RUNNERS_UP
        runners = Runners(*(torch.full(shape, UNTOUCHED, device=DEVICE) for _ in range(2))) if self.ranked else None
        inside = slice(1, 1 + self.places)
        return {"out": drafts[:, inside], "chances": chances[:, inside], "runners": runners}


def computed(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """By the kernels, once it is seen that nothing else is written."""
    results, before = case.results(), given["logits"].clone()
    wide = [results["out"]._base, results["chances"]._base]
    old = [t.clone() for t in wide]
    kernel.draft(**given, **results)
    assert torch.equal(given["logits"].nan_to_num(), before.nan_to_num())
    for now, then in zip(wide, old, strict=True):
        outside = [0, *range(1 + case.places, now.shape[1])]
        assert torch.equal(now[:, outside], then[:, outside])
    return results


def by_hand(case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """One draft at a time, with probabilities in float64; its token by the sampler, which is tested for itself."""
    results, logits = case.results(), given["logits"]
    if given["rows"] is not None:
        logits = logits[given["rows"].long()]
    names = "params", "lengths", "first", "suppressed", "seen", "sampling", "filtering"
    tokens = sampler.sample(logits, **{name: given[name] for name in names})
    for b in range(len(logits)):
        for r in range(case.places):
            known = given["given"] is not None and r < given["given"][b]
            if not known:
                results["out"][b, r] = tokens[b, r] if given["made"][b, r] else 0
            token = int(results["out"][b, r])
            row = logits[b, r].double().masked_fill(given["suppressed"], -math.inf)
            results["chances"][b, r] = KNOWN if known else row.softmax(0)[token] * given["made"][b, r]
            if results["runners"] is not None:
                order = [t for t in row.sort(descending=True, stable=True).indices.tolist() if t != token]
                results["runners"].tokens[b, r] = torch.tensor(order[:RUNNERS_UP], device=DEVICE)
                if r:
                    results["runners"].followers[b, r - 1] = token
    return results


def agree(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert torch.equal(found["out"], wanted["out"])
    torch.testing.assert_close(found["chances"], wanted["chances"], rtol=1e-5, atol=1e-9)
    for mine, theirs in zip(found["runners"] or (), wanted["runners"] or (), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


SETS = {"greedy": MIXED[:1] * 2, "penalised": MIXED[:2], "sampled": MIXED[2:4], "mixed": MIXED[3:7]}


@pytest.mark.parametrize("kind", ["usual", "peaked", "ties"])
@pytest.mark.parametrize("vocab", [90, 9000])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("params", SETS.values(), ids=SETS.keys())
def test_drafts_chances_and_runners_up(params: list[SamplingParams], chosen: bool, vocab: int, kind: str) -> None:
    """By hand, by the kernels and by their twin; in a chunk and in several."""
    case = Case(params, places=3, vocab=vocab, kind=kind, seed=vocab, chosen=chosen, penalty=params != SETS["greedy"])
    given = case.tensors()
    wanted, twin = by_hand(case, given), case.results()
    plain_sample.draft(**given, **twin)
    agree(computed(case, given), wanted)
    agree(twin, wanted)


@pytest.mark.parametrize("params", [MIXED[:1], MIXED[5:6]], ids=["greedy", "sampled"])
def test_a_large_vocabulary(params: list[SamplingParams]) -> None:
    case = Case(params, places=2, vocab=151_936, seed=1, penalty=True)
    given = case.tensors()
    given["made"].fill_(True)
    wanted = by_hand(case, given)
    agree(computed(case, given), wanted)
    assert (wanted["chances"] > 0).all()


@pytest.mark.parametrize("params", [MIXED[:1], MIXED[2:3]], ids=["greedy", "sampled"])
def test_without_what_may_be_absent(params: list[SamplingParams]) -> None:
    case = Case(params, chosen=False, given=False, ranked=False)
    given = case.tensors()
    given["suppressed"].zero_()
    wanted = by_hand(case, given)
    given["suppressed"] = None
    agree(computed(case, given), wanted)
    assert (wanted["chances"] > 0).any()


@pytest.mark.parametrize("vocab", [2, 5, 40])
def test_few_tokens(vocab: int) -> None:
    """Where there are not enough, runners-up are still tokens, and the others come first."""
    case = Case(MIXED[:1] * 2, vocab=vocab, given=False)
    given = case.tensors()
    given["suppressed"] = torch.arange(vocab, device=DEVICE) >= 3
    found = computed(case, given)
    assert ((found["runners"].tokens >= 0) & (found["runners"].tokens < vocab)).all()
    best = given["logits"][given["rows"].long()].masked_fill(given["suppressed"], -math.inf)
    best = best.scatter(2, found["out"][..., None], -math.inf)
    assert torch.equal(found["runners"].tokens[:, :, 0], best.argmax(2))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("params", [MIXED[0], MIXED[1], MIXED[5]], ids=["greedy", "penalised", "sampled"])
def test_bad_logits_are_reported(params: SamplingParams, broken: float) -> None:
    case = Case([params] * 2, vocab=5000, chosen=False, given=False, penalty=params is MIXED[1])
    given, bad = case.tensors(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    given["made"].fill_(True)
    given["suppressed"][[7, 4500]] = False
    given["suppressed"][0] = True  # the token that stands for none
    fine = computed(case, given | {"bad": bad})
    assert not bad.any()
    given["logits"][0, 1, 4500] = given["logits"][1, 2, [7, 0]] = broken
    given["logits"][1, 3, 1:] = -math.inf
    touched = torch.zeros_like(given["made"])
    touched[[0, 1, 1], [1, 2, 3]] = True
    for draft in kernel.draft, plain_sample.draft:
        found = case.results()
        draft(**given | {"bad": bad.zero_()}, **found)
        assert bad.tolist() == [1]
        assert not found["out"][touched].any() and not found["chances"][touched].any()
        assert torch.equal(found["out"][~touched], fine["out"][~touched])
        torch.testing.assert_close(found["chances"][~touched], fine["chances"][~touched])


def test_bad_logits_of_suppressed_tokens_are_no_matter() -> None:
    case = Case(MIXED[:1] + MIXED[2:3])
    given, bad = case.tensors(), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    wanted = computed(case, given)
    given["logits"][:, given["suppressed"]] = math.nan
    agree(computed(case, given | {"bad": bad}), wanted)
    assert not bad.any()


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("params", [MIXED[:1], MIXED[1:2], MIXED[5:6]], ids=["greedy", "penalised", "sampled"])
def test_two_launches_and_the_sampler(
    params: list[SamplingParams], ranked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of torch's: no copy of logits, no look over a vocabulary."""
    case, launched = Case(params, vocab=9000, ranked=ranked, penalty=params is not MIXED[:1]), list[str]()

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, _: object) -> Any:
            return lambda *_, **__: launched.append(self.name)

    aten = torch.ops.aten
    free = aten.empty, aten.view, aten.detach  # memory, or another look at it

    class Torch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket not in free:
                launched.append(str(func))
            return func(*args, **kwargs or {})

    given, results = case.tensors(), case.results()
    for module, name in ((sampler, "draw"), (kernel, "chunks"), (kernel, "conclude")):
        monkeypatch.setattr(module, name, Noted(name))
    with Torch():  # type: ignore[no-untyped-call]
        kernel.draft(**given, **results)
    assert launched == ["draw"] * given["sampling"] + ["chunks", "conclude"]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("vocab", [4096, 151_936])
@pytest.mark.parametrize("params", [MIXED[:1] * 3, MIXED[3:6]], ids=["greedy", "sampled"])
def test_a_captured_call_follows_its_inputs(params: list[SamplingParams], vocab: int) -> None:
    case = Case(params, vocab=vocab, places=15)
    held, results = case.tensors(), case.results()

    def run() -> None:
        kernel.draft(**held, **results)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for case.seed in range(1, 9):
        fresh = case.tensors()
        for name, tensor in held.items():
            if isinstance(tensor, Tensor):
                tensor.copy_(fresh[name])
        begun = case.results()
        for name in ("out", "chances"):
            results[name].copy_(begun[name])
        for mine, theirs in zip(results["runners"][:2], begun["runners"][:2], strict=True):
            mine.copy_(theirs)
        graph.replay()
        agree(results, by_hand(case, fresh))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"logits": torch.zeros(20, 90).double()}, "float32"),
    "logits of a batch": ({"logits": torch.zeros(2, 5, 90)}, "if rows are chosen"),
    "logits of none": ({"rows": None}, r"logits must be \(B, R, V\)"),
    "rows": ({"rows": torch.zeros(2, 5, dtype=torch.int64)}, "rows must be"),
    "strided rows": ({"rows": torch.zeros(2, 10, dtype=torch.int32, device=DEVICE)[:, ::2]}, "rows must be"),
    "made": ({"made": torch.zeros(2, 4, dtype=torch.bool)}, "made must be"),
    "made of numbers": ({"made": torch.zeros(2, 5)}, "made must be"),
    "strided made": ({"made": torch.zeros(2, 10, dtype=torch.bool, device=DEVICE)[:, ::2]}, "made must be"),
    "given": ({"given": torch.zeros(2)}, "given must be"),
    "lengths": ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths"),
    "seen": ({"seen": torch.zeros(2, 10)}, "seen"),
    "out": ({"out": torch.zeros(2, 5)}, "out must be"),
    "strided out": ({"out": torch.zeros(2, 10, dtype=torch.int64, device=DEVICE)[:, ::2]}, "contiguous in a row"),
    "chances": ({"chances": torch.zeros(2, 6)}, "chances must be"),
    "runners": ({"runners": Runners(*(torch.zeros(2, 5, 3, dtype=torch.int64),) * 2)}, "runners-up must be"),
    "runners of lists": ({"runners": Runners(*(torch.zeros(2, 5, 4).int(),) * 2)}, "runners-up must be"),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes(change: dict[str, Any], message: str) -> None:
    case = Case(MIXED[:2])
    given = case.tensors() | case.results()
    given |= {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in change.items()}
    with pytest.raises(TidarError, match=message):
        kernel.draft(**given)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels import draft
from tidar.kernels.workspace import power_of_2
chunk, tops = 4096, 5 * {ranked}
parts = -(-{vocab} // chunk)
types = dict(logits="*fp32", rows="*i32", penalties="*fp32", suppressed="*u8", seen="*u8", masses="*fp32",
    peaks="*fp32", ids="*i32", tops="*fp32", names="*i32", sampled="*i64", made="*i1", given="*i32", out="*i64",
    chances="*fp32", runners="*i64", followers="*i64", bad="*i32")
fixed = dict(VOCAB={vocab}, TOPS=tops, PDL=1) | dict.fromkeys({absent})
if not tops:
    fixed |= dict.fromkeys(("tops", "names", "runners", "followers"))
judged = dict(PARTS=parts, PARTS_UP=power_of_2(parts), TOPS_UP=power_of_2(max(1, parts * tops)), BEST=4, KNOWN=0.9)
for kernel, more, warps in ((draft.chunks, dict(CHUNK=chunk), 4), (draft.conclude, judged, 1)):
    names = kernel.arg_names
    more = {{n: v for n, v in (fixed | more).items() if n in names}}
    kinds = {{n: "constexpr" if n in more else types.get(n, "i32") for n in names}}
    aligned = [n for n in names if kinds[n].startswith("*") and n not in ("out", "chances") or n == "row_step"]
    even = {{(names.index(n),): [["tt.divisibility", 16]] for n in aligned}}
    source = ASTSource(kernel, kinds, {{(names.index(n),): v for n, v in more.items()}}, even)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    path = {path!r} + "/" + made.metadata.name
    open(path, "wb").write(made.asm["cubin"])
    before, _ = made.asm["ptx"].split("griddepcontrol.wait;")
    touched = [n for n in ("ld.global", "st.global", "cp.async") if n in before]
    assert not touched, touched
    print(path)
"""
ABSENT: dict[str, tuple[str, ...]] = {
    "greedy": ("seen", "sampled", "given"),
    "penalised": ("sampled", "rows"),
    "sampled": ("seen", "peaks", "ids"),
}


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [4096, 151_936])
@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("absent", ABSENT.values(), ids=ABSENT.keys())
def test_compiles_for_hopper_without_spilling(
    absent: tuple[str, ...], ranked: bool, vocab: int, tmp_path: Path
) -> None:
    program = COMPILE.format(vocab=vocab, ranked=ranked, absent=absent, path=str(tmp_path))
    (tmp_path / "compile.py").write_text(program)
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    for path in done.stdout.split():
        used = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True).stdout
        assert " STACK:0 " in used, used
