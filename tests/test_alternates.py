"""Alternates: tokens that came next after a draft, tried behind the drafts before it. They change no token."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import Case, agree, computed, exact
from torch import Tensor

from tidar import layout, mask
from tidar.api import Model
from tidar.checkpoint import load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import Outcome, Plan, Shape, candidates, drafted, few, filled, shapes
from tidar.decode.planner import Acceptance
from tidar.decode.policy import Fixed, Planning
from tidar.decode.tidar import TidarDecoder
from tidar.errors import TidarError
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine
from tidar.fast.step import Step
from tidar.kernels import reference, reference_chain
from tidar.kernels import reference_step as plain
from tidar.kernels.reference_step import SURE, Picking, Runners
from tidar.model import CausalLM
from tidar.proposals import KNOWN
from tidar.sampling import RowParams, runners_up

PROMPTS = [list(b"def f(x):\n    return x"), list(b"a"), list(b"class A:\n")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# --- who sees whom ---


def test_layout_by_hand() -> None:
    found = layout.step([2], 2, [1, 2], 2, alternates=1)
    sees = mask.dense(found)[0, 0] if mask.dense(found).dim() == 4 else mask.dense(found)[0]
    rows = [
        "1110 0 0 00 00",  # d_1
        "1111 0 0 00 00",  # d_2
        "1110 1 0 00 00",  # behind d_1
        "1111 0 1 00 00",  # behind d_2
        "1110 0 0 11 00",
        "1110 0 0 11 00",
        "1111 0 0 00 11",
        "1111 0 0 00 11",
    ]
    expected = [[c == "1" for c in row.replace(" ", "")] for row in rows]
    assert sees.tolist() == expected
    assert found.positions.tolist() == [[2, 3, 3, 4, 3, 4, 4, 5]]
    assert (found.clean, found.rows.tolist()) == (4, [0, 1, 2, 3, 5, 7])


# --- attention ---


@dataclasses.dataclass(frozen=True)
class Others(Case):
    """A step with alternates."""

    alternates: int = 2

    @property
    def queries(self) -> int:
        return super().queries + self.alternates * len(self.levels)

    @property
    def options(self) -> dict[str, Any]:
        return super().options | {"alternates": self.alternates}


CASES = {
    "two each": Others(),
    "one each": Others(alternates=1),
    "many": Others(alternates=7, levels=(0, 1, 4), causal=4, block=3),
    "window": Others(window=9, lengths=(5, 37)),
    "own levels": Others(apart=True, lengths=(5, 37, 0)),
    "small tiles": dataclasses.replace(Others(alternates=3), tiles=dataclasses.replace(Case().tiles, rows=16)),
}


def test_visible_is_the_layout() -> None:
    """The kernels' twin and the layout say the same, each in its own way."""
    for k, levels, m, a, window in ((3, [1, 3], 4, 2, None), (4, [2], 2, 3, 5), (2, [1, 2], 1, 1, None)):
        plan = layout.step([6], k, levels, m, alternates=a)
        wanted = mask.dense(plan.windowed(window))
        wanted = wanted.view(wanted.shape[-2:])
        assert torch.equal(reference.visible(6, plan.queries, k, levels, window, a), wanted)


@pytest.mark.parametrize("name", CASES)
def test_attention_with_alternates(name: str) -> None:
    case = CASES[name]
    given = case.tensors()
    assert agree(computed(case, given), exact(case, given))


@pytest.mark.parametrize("fault", ["each other", "masks see them", "a later draft", "not themselves"])
def test_a_wrong_view_of_alternates_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Others(lengths=(5, 37))
    given = case.tensors()
    right, first = reference.visible, case.causal

    def wrong(length: int, *rest: Any) -> Tensor:
        seen = right(length, *rest)
        if fault == "each other":
            seen[first + 1, length + first] = True
        elif fault == "masks see them":
            seen[first + case.alternates * len(case.levels), length + first] = True
        elif fault == "a later draft":
            seen[first, length + case.levels[0]] = True
        else:
            seen[first, length + first] = False
        return seen

    monkeypatch.setattr(reference, "visible", wrong)
    assert not agree(computed(case, given), exact(case, given))


def test_queries_must_be_as_many_as_said() -> None:
    case = Others()
    given = case.tensors()
    for wrong in (40, -1, 2 + case.block):  # the last leaves no masks
        with pytest.raises(TidarError, match="alternates of each of"):
            reference.attend(**given, **case.options | {"alternates": wrong})


def test_rotate_places_alternates() -> None:
    from tidar.kernels.rotate import rotate

    turn = torch.arange(64.0, device=DEVICE)[:, None].repeat(1, 16), torch.zeros(64, 16, device=DEVICE)
    place = [0, 1, 2, 1, 1, 3, 3, 1, 2, 3, 4]
    levels = torch.tensor([1, 3], device=DEVICE)
    stores = torch.zeros(3, 8, 1, 16, device=DEVICE), torch.zeros(3, 8, 1, 16, device=DEVICE)
    rest = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([4]).int(), torch.tensor([3]).int()
    for run in (rotate, plain.rotate):
        heads = torch.ones(1, 11, 3, 16, device=DEVICE)
        options: dict[str, Any] = {"eps": 1e-6, "causal": 3, "alternates": 2}
        given = *turn, *stores, *(t.to(DEVICE) for t in rest), levels
        q, k, _ = run(heads, None, None, *given, **options)
        for turned in (q, k):
            assert turned[0, :, 0, 0].tolist() == [4.0 + each for each in place]


# --- beside the network ---


@pytest.mark.parametrize("scored", [False, True])
def test_embed_picks_their_tokens(scored: bool) -> None:
    """The best behind the draft, of tokens in their order or of lists with their scores."""
    from tidar.kernels import accept as fused

    rows, k, count, each, vocab, listed = 3, 5, 2, 3, 90, 16
    table = torch.randn(vocab, 8, device=DEVICE)
    chances = torch.rand(rows, k + 2, device=DEVICE)
    drafts = torch.randint(vocab, (rows, k + 2), device=DEVICE)
    tokens = torch.randint(vocab, (rows, k - 1, listed), device=DEVICE)
    runners = Runners(tokens)
    if scored:
        scores = torch.randn(rows, k - 1, listed, listed, device=DEVICE).round(decimals=1)  # some are equal
        runners = Runners(tokens.int(), scores, torch.randint(listed, (rows, k - 1), device=DEVICE).int())
    best = runners.best(each)
    found = []
    for run in (fused.embed, plain.embed):
        places, chosen = (torch.full((rows, n), -7, device=DEVICE) for n in (k, count))
        named = torch.full((rows, count, each), -7, device=DEVICE)
        picking = Picking(chances, places, chosen, runners, named)
        out = run(drafts, table, vocab - 1, k + count * (each + 4), k, picking=picking)
        for row in range(rows):
            wanted = [int(best[row, min(level, k - 1) - 1, a]) for level in chosen[row].tolist() for a in range(each)]
            assert named[row].flatten().tolist() == wanted
            assert torch.equal(out[row, k : k + count * each], table[wanted])
        assert torch.equal(out[:, :k], table[drafts[:, :k]])
        assert torch.equal(out[:, k + count * each :], table[-1].expand(rows, count * 4, 8))
        found.append((places, chosen, named, out))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_runners_up_by_hand() -> None:
    scores = torch.tensor([[9.0, 1.0, 2.0], [3.0, 5.0, 5.0], [0.0, 0.0, 0.0]])[None, None]
    tokens = torch.tensor([[[70, 80, 90]]], dtype=torch.int32)
    for came, wanted in ((0, [90, 80]), (1, [90, 70]), (2, [80, 90])):
        found = Runners(tokens, scores, torch.tensor([[came]], dtype=torch.int32)).best(2)
        assert found.tolist() == [[wanted]]
    assert Runners(tokens).best(2).tolist() == [[[70, 80]]]
    params = RowParams.of([SamplingParams()], device=torch.device("cpu"))
    named = runners_up(torch.tensor([[[1.0, 5.0, 3.0]]]), params, None, torch.tensor([[1]]), 4)
    assert named.tolist() == [[[2, 0, 0, 0]]], "a small vocabulary has no more"


def test_accept_by_hand() -> None:
    """Level 1 or 3 of four drafts, two alternates each: met or not, drafted for or not."""
    from tidar.kernels import accept as fused

    levels = torch.tensor([[1, 3]] * 5, device=DEVICE)
    others = torch.tensor([[[50, 51], [52, 53]]] * 5, device=DEVICE)
    stand, follow = [1, 3, 3, 2, 1], [51, 52, 60, 50, 52]
    met, behind = [1, 0, -1, -1, -1], [0, 0, 0, 1, 0]
    drafts = torch.arange(20, device=DEVICE).view(5, 4)
    sampled = drafts.roll(-1, 1).contiguous()
    for row, n in enumerate(stand):
        sampled[row, n - 1] = follow[row]
    queries = 4 + 2 * (2 + 4)
    for module in (fused, plain):
        ints = [torch.zeros(5, dtype=torch.int32, device=DEVICE) for _ in range(3)]
        ring = torch.zeros(2, 5, 9, dtype=torch.int32, pin_memory=DEVICE == "cuda")
        given = [sampled, drafts.clone(), ints[0], ints[1] + 99, ints[2], ring, torch.zeros_like(ints[0][:1])]
        states, made = module.accept(*given, levels=levels, places=None, alternates=others, masks=4, queries=queries)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        assert ring[0, :, 1].tolist() == behind and ring[0, :, 3].tolist() == met
        masks = torch.tensor([0, 4, 4, 0, 0])  # where in all masks its block begins
        for row in range(5):
            plainly = [row * queries + 8 + int(masks[row]) + behind[row] + j for j in (1, 2, 3)]
            there = [1 if j + behind[row] < 4 else 0 for j in (1, 2, 3)]
            if met[row] >= 0:
                plainly[0], there[0] = row * queries + 4 + (2 if stand[row] == 3 else 0) + met[row], SURE
            assert made[row].tolist() == there
            assert all(
                at == to for at, to, is_there in zip(states[row].tolist(), plainly, there, strict=True) if is_there
            )


@pytest.mark.parametrize("sampling", [False, True])
def test_the_chain_tells_what_came_next(sampling: bool) -> None:
    from tidar.kernels import chain as fused
    from tidar.kernels.shortlists import Shortlists

    draw = torch.Generator().manual_seed(1)
    rows, places, vocab, width, count = 2, 4, 300, 20, 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(DEVICE)

    base, state, tokens, mix = (
        normal(rows, places, vocab),
        normal(rows, places, width),
        normal(vocab, width),
        normal(vocab, width),
    )
    first, suppressed = torch.tensor([3, 7], device=DEVICE), torch.zeros(vocab, dtype=torch.bool, device=DEVICE)
    made = torch.tensor([[SURE, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.int8, device=DEVICE)
    given = base, state, first, made, tokens, mix, suppressed
    options = {
        "temperature": torch.tensor([0.9, 0.0], device=DEVICE),
        "seed": torch.tensor([5, 6], device=DEVICE),
        "lengths": torch.tensor([11, 2], dtype=torch.int32, device=DEVICE),
        "offset": 1,
        "sampling": sampling,
    }
    lists = Shortlists.for_step(rows, places, ranked=True, device=DEVICE)
    named = reference_chain.PlainLists.of(rows, places, ranked=True, device=DEVICE)
    found = []
    for module, kept in ((fused, lists), (reference_chain, named)):
        chances = torch.zeros(rows, places, device=DEVICE)
        out = module.chain(*given, **options, chances=chances, shortlists=kept)
        found.append((out, chances, kept.runners.best(count)))
    torch.testing.assert_close(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][2])
    out, chances, others = found[0]
    assert chances[0, 0] == pytest.approx(KNOWN) and chances[0, 3] == 0 and bool((chances[1] < 1).all())
    for row in range(rows):
        for place in range(places - 1):
            same = {int(out[row, place]), *others[row, place].tolist()}
            assert len(same) == count + 1, "none twice, and not the draft"
    if not sampling:
        wanted = base[0, 0].topk(1 + count).indices.tolist()
        assert [int(out[0, 0]), *others[0, 0].tolist()] == wanted, "a sure one is of its logits alone"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tidar.kernels import accept
kinds = dict(named="*i32", scores="*fp32", came="*i32", sampled="*i64",
    drafts="*i64", lengths="*i32", limits="*i32", tickets="*i32", ring="*i32", places="*i64",
    levels="*i64", alternates="*i64", states="*i32", made="*i8", seen="*i1", bad="*i32",
    table="*bf16", out="*bf16", chances="*fp32")
sizes = dict(DRAFTS=16, DRAFTS_UP=16, PROPOSALS=3, PDL=1, QUERIES=79, EACH=5)
for kernel, more in (
    (accept._embed, dict(D=384, WIDTH=512, RUNS=15, SLOTS=256)),
    (accept._accept, dict(PROPOSALS_UP=4, EACH_UP=8, SURE=2, MASKS=16, MASKS_UP=16, DEPTH=16)),
):
    fixed, names = sizes | more, kernel.arg_names
    types = {n: "constexpr" if n in fixed else kinds.get(n, "i32") for n in names}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in fixed.items()}, {})
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=1))
"""


@pytest.mark.slow
def test_picking_and_accepting_compile_for_hopper(tmp_path: Path) -> None:
    """The interpreter takes programs that the compiler does not; the compiler needs no GPU."""
    (tmp_path / "compile.py").write_text(COMPILE)
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, tmp_path / "compile.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- decoders ---


@pytest.fixture(scope="module")
def leaning(converted: Callable[[str], Path]) -> CausalLM:
    """With a transition, whose drafts lean on the token before."""
    model = load_model(converted("qwen3"), dtype="float32", device=DEVICE)
    model.add_transition(12).initialise(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        weight = model.transition.out.weight  # type: ignore[union-attr]
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


class Noting(TidarDecoder):
    """Keeps what came of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.came: list[Outcome] = []

    def step(self) -> list[list[int]]:
        certain = super().step()
        for row, (met, n) in enumerate(zip(self.outcome.met, self.outcome.accepted, strict=True)):
            before = self.came[-1].met[row] if self.came and len(self.came[-1].met) > row else -1
            assert before < 0 or self.rows_left or n > 1, "a sure draft stands"
            assert met < 0 or self.outcome.behind[row] == 0
        self.rows_left = False
        self.came.append(self.outcome)
        return certain

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.rows_left = True

    rows_left = False


@pytest.mark.parametrize("acceptance", ["gumbel", "ratio"])
def test_a_sure_draft_stands(leaning: CausalLM, acceptance: Any) -> None:
    """Behind an alternate that came, with whatever sampling: its token is what will be sampled, or accepted."""
    for temperature, penalty in ((0.0, 1.0), (0.8, 1.0), (0.7, 1.3)):
        params = [
            SamplingParams(max_new_tokens=60, temperature=temperature, top_p=0.9, repetition_penalty=penalty, seed=n)
            for n in range(3)
        ]
        decoder = Noting(leaning, draft_len=4, proposals=3, alternates=8, acceptance=acceptance)
        generation.generate(leaning, PROMPTS, params, lambda decoder=decoder: decoder, 3)  # type: ignore[misc]
        assert any(met >= 0 for each in decoder.came for met in each.met)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.0, "repetition_penalty": 1.2}]
)
@pytest.mark.parametrize("sizes", [(4, 2, 3), (5, 5, 1), (3, 1, 8)])
@pytest.mark.parametrize("with_one", [True, False])
def test_tokens_are_those_of_ar(
    converted: Callable[[str], Path],
    leaning: CausalLM,
    options: dict[str, float],
    sizes: tuple[int, int, int],
    with_one: bool,
) -> None:
    """Plain and fast, alone and in a batch, with a transition and without."""
    core = leaning if with_one else load_model(converted("qwen3"), dtype="float32", device=DEVICE)
    params = [SamplingParams(max_new_tokens=25 + n, seed=n, ignore_eos=True, **options) for n in range(3)]  # type: ignore[arg-type]
    k, count, each = sizes
    engine = Engine(core, plain=DEVICE == "cpu")

    def slow() -> TidarDecoder:
        return TidarDecoder(core, draft_len=k, proposals=count, alternates=each)

    def fast() -> FastDecoder:
        return FastDecoder(engine, Fixed(k, count, each))

    texts = [
        [c.token_ids for c in generation.generate(core, PROMPTS, params, make, size)]
        for make in (lambda: TidarDecoder(core, draft_len=1), slow, fast)
        for size in (1, 3)
    ]
    assert all(text == texts[0] for text in texts[1:])


def test_fast_and_plain_meet_the_same(leaning: CausalLM) -> None:
    """Greedily both draft alike, so the same alternates are met."""
    engine, learnt = Engine(leaning, plain=DEVICE == "cpu"), []

    class Listening(Fixed):
        def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
            learnt.append(outcome)

    fast = FastDecoder(engine, Listening(4, 4, 8), ahead=1)
    slow = TidarDecoder(leaning, draft_len=4, proposals=4, alternates=8)
    params = [SamplingParams(max_new_tokens=200)] * 3
    met = 0
    with torch.inference_mode():
        assert fast.prefill(PROMPTS, params) == slow.prefill(PROMPTS, params)
        lists = engine.network.lists(fast._slots, 3, ranked=True)  # a prefill of the fast path names none
        if lists.runners.scores is None:
            lists.tokens[:3] = slow._others[:3, :3]
        for _ in range(60):
            fast._slots.chances[:3, 1:4] = slow._chances.float()
            made = torch.nn.functional.pad(slow._chances > 0, (0, 1))
            assert fast.step() == slow.step()
            fast._learn()
            assert learnt[-1][:3] == slow.outcome[:3]
            for row, n in enumerate(slow.outcome.accepted):
                if made[row, n - 1]:  # where nothing was drafted, the fast path may know a token yet
                    assert learnt[-1].met[row] == slow.outcome.met[row]
                    met += slow.outcome.met[row] >= 0
    assert met > 3


def test_a_step_tries_what_came_next(leaning: CausalLM) -> None:
    engine = Engine(leaning, plain=DEVICE == "cpu")
    decoder = FastDecoder(engine, Fixed(4, 2, 2), ahead=1)
    with torch.inference_mode():
        decoder.prefill(PROMPTS, [SamplingParams(max_new_tokens=50)] * 3)
        decoder.step()
        slots = decoder._slots
        step = Step(engine.network, slots, Shape(4, 2, 4, 2), decoder._flags)
        named = engine.network.lists(slots, 3, ranked=True).runners.best(2).clone()
        step()
    assert bool(named[:3].any())
    for row in range(3):
        levels = step._levels[row].tolist()
        assert step._alternates[row].tolist() == [named[row, min(level, 3) - 1].tolist() for level in levels]


# --- plans ---


def test_alternates_fill_tiles() -> None:
    for k, count in ((16, 2), (16, 3), (16, 6), (8, 3), (8, 2), (4, 2), (5, 2)):
        plan = filled(k, count)
        queries = shapes(plan)[0].queries
        assert 1 <= plan.alternates <= 4
        assert -(-queries // 16) == -(-(k + count * (k + 1)) // 16), "no tile more than one alternate each needs"
        assert plan.alternates == 4 or -(-(queries + count) // 16) > -(-queries // 16), "and no room left"
    assert [p.alternates for p in few(16) if p.draft_len == 16 and p.method == "tidar"] == [0, 0, 0, 0, 2, 4, 4]
    assert any(p.alternates for p in candidates(16)) and not any(p.alternates for p in few(16) if p.method != "tidar")
    assert (drafted(1), drafted(2, 1), drafted(3, 4)) == (
        "1 proposal",
        "2 proposals, 1 alternate",
        "3 proposals, 4 alternates",
    )


def test_what_alternates_are_worth_is_learned() -> None:
    seen = Acceptance()
    believed = [seen.sure(n) for n in range(9)]
    assert believed[0] == 0 and believed == sorted(believed) and 0.3 < believed[1] < 0.4 < believed[8] < 0.6
    import numpy as np

    for _ in range(300):
        seen.tried(2, np.array([0, -1, 1, -1]))
    assert seen.sure(1) == pytest.approx(0.25, abs=0.01) and seen.sure(2) == pytest.approx(0.5, abs=0.01)
    assert seen.sure(3) > 0.5, "what was not tried is believed as before"
    assert seen.cover(Plan("tidar", 8, 2, 2)).sure == pytest.approx(0.5, abs=0.01)
    assert seen.cover(Plan("tidar", 8, 2)).sure == 0


def test_a_sure_draft_says_nothing_of_others() -> None:
    import numpy as np

    told, apart = Acceptance(), Acceptance()
    kinds, counts, accepted = np.array([1, 1, 0]), np.array([3, 3, 3]), np.array([2, 0, 1])
    told.update(kinds, counts, accepted, np.array([True, False, True]))
    apart.update(kinds, counts, accepted)
    change = apart._told - told._told
    wanted = np.zeros_like(change)
    wanted[1, 1] = wanted[0, 1] = wanted[4, 1] = wanted[3, 1] = 1
    assert change == pytest.approx(wanted)


def test_the_planner_tells_sure_drafts(leaning: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of each alternate that came, and not that the draft behind it stood."""
    tried: list[tuple[int, list[int]]] = []
    sure: list[list[bool]] = []
    monkeypatch.setattr(Acceptance, "tried", lambda self, n, met, steps: tried.append((n, met.tolist())))
    real = Acceptance.update

    def noting(self: Acceptance, kinds: Any, counts: Any, accepted: Any, known: Any, steps: int) -> None:
        sure.append(known.tolist())
        real(self, kinds, counts, accepted, known, steps)

    monkeypatch.setattr(Acceptance, "update", noting)
    policy = Planning(4, [Plan("tidar", 4, 2, 3)])
    policy.open(2)
    from tidar.decode.clock import Times

    policy.begin(lambda _: Times([(1, 1.0), (1000, 1.0)]))
    shape = Shape(4, 2, 4, 3)
    policy.learn(shape, Outcome([1, 2], [0, 0], [0, 1], [2, -1]))
    policy.learn(shape, Outcome([3, 4], [0, 1], [0, 1], [-1, -1]))
    policy.learn(shape, Outcome([4, 4], [0, 0], [0, 1], [-1, -1]))
    assert tried == [(3, [2, -1]), (3, [-1]), (3, [-1, -1])], "not behind tails"
    assert sure == [[False, False], [True, False], [False, False]]


def test_counts_are_checked(qwen3: Model) -> None:
    for wrong in (-1, 9, 1.5, True, None):
        with pytest.raises(TidarError, match="alternates must be a number between 0 and 8"):
            TidarDecoder(qwen3.core, draft_len=4, alternates=wrong)  # type: ignore[arg-type]
    for method in ("linear", "auto"):
        with pytest.raises(TidarError, match="takes no proposals, alternates or beta"):
            qwen3.generate("a", method=method, alternates=2)
    text = [c.token_ids for c in qwen3.generate(["ab", "c"], SamplingParams(max_new_tokens=20), method="ar")]
    assert [c.token_ids for c in qwen3.generate(["ab", "c"], SamplingParams(max_new_tokens=20), alternates=3)] == text


def test_rows_begin_without_those_of_others(leaning: CausalLM) -> None:
    """So the forwards that a text takes do not hang on the texts before it."""
    engine = Engine(leaning, plain=DEVICE == "cpu")
    params = [SamplingParams(max_new_tokens=60, ignore_eos=True)]

    def forwards(prompt: list[int]) -> int:
        make = lambda: FastDecoder(engine, Fixed(4, 3, 8))  # noqa: E731
        return generation.generate(leaning, [prompt], params, make, 1)[0].forwards

    alone = [forwards(prompt) for prompt in PROMPTS]
    assert [forwards(prompt) for prompt in PROMPTS[::-1]] == alone[::-1]
    lists = engine.network.lists(engine._slots[0][0], 3, ranked=True)
    assert bool(lists.runners.best(2).any())
    with torch.inference_mode():
        engine._slots[0][0].open(PROMPTS[:1], params, [9], [[1]])
    assert not bool(lists.runners.best(2).any())
