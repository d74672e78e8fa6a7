"""Alternates: tokens that came next after a draft, tried behind the drafts before it. They change no token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tidar import proposals
from tidar.api import Model
from tidar.checkpoint import embedded_checkpoint, load_model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import Outcome, Plan, Shape, candidates, drafted, few, filled, shapes
from tidar.decode.planner import Acceptance, Cover, tokens_per_step
from tidar.decode.policy import Fixed, Planning
from tidar.decode.tidar import TidarDecoder
from tidar.errors import TidarError
from tidar.fast.decoder import FastDecoder
from tidar.fast.engine import Engine
from tidar.fast.step import Step
from tidar.model import CausalLM
from tidar.proposals import RUNNERS_UP, outcomes, paired

PROMPTS = [list(b"def f(x):\n    return x"), list(b"a"), list(b"class A:\n")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
            before = self.came[-1].sure[row] if self.came and len(self.came[-1].sure) > row else 0
            assert self.rows_left or n > before, "a sure draft stands"
            assert (met >= 0) == (self.outcome.sure[row] > 0)
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
        decoder = Noting(leaning, draft_len=4, proposals=3, alternates=12, acceptance=acceptance)
        generation.generate(leaning, PROMPTS, params, lambda decoder=decoder: decoder, 3)  # type: ignore[misc]
        assert any(sure for each in decoder.came for sure in each.sure)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.0, "repetition_penalty": 1.2}]
)
@pytest.mark.parametrize("sizes", [(4, 2, 5), (5, 5, 1), (3, 1, 12), (2, 1, 4)])
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

    fast = FastDecoder(engine, Listening(4, 4, 12), ahead=1)
    slow = TidarDecoder(leaning, draft_len=4, proposals=4, alternates=12)
    params = [SamplingParams(max_new_tokens=200)] * 3
    met = 0
    with torch.inference_mode():
        assert fast.prefill(PROMPTS, params) == slow.prefill(PROMPTS, params)
        fast.step()  # its prefill names no runners-up
        slow.step()
        slots = fast._slots
        for _ in range(60):
            slots.chances[:3, 1:4] = slow._chances.float()
            made = torch.nn.functional.pad(slow._chances > 0, (0, 1))
            before = slow.outcome.sure
            assert fast.step() == slow.step()
            fast._learn()
            assert learnt[-1][:3] == slow.outcome[:3]
            for row, n in enumerate(slow.outcome.accepted):
                # Where nothing was drafted, or it was given, each path may know other tokens.
                if made[row, n - 1] and n - 1 >= before[row]:
                    assert learnt[-1].met[row] == slow.outcome.met[row]
                    met += slow.outcome.met[row] >= 0
    assert met > 3


def test_without_a_transition(converted: Callable[[str], Path]) -> None:
    """What an alternate tells stands, and what would follow it is the next draft, which leans on none."""
    core = load_model(converted("qwen3"), dtype="float32", device=DEVICE)
    engine, told = Engine(core, plain=DEVICE == "cpu"), list[Any]()

    class Listening(Fixed):
        def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
            before = told[-1] if told else [0] * 3
            assert all(n > sure for n, sure in zip(outcome.accepted, before, strict=True))
            told.append(outcome.sure)

    decoder = FastDecoder(engine, Listening(4, 2, 12), ahead=1)
    with torch.inference_mode():
        decoder.prefill(PROMPTS, [SamplingParams(max_new_tokens=400)] * 3)
        slots = decoder._slots
        for _ in range(80):
            decoder.step()
            decoder._learn()
            tokens, behind = engine.network.lists(slots, 3, ranked=True).runners.best()
            assert torch.equal(behind[:3, :2], slots.drafts[:3, 2:4, None].expand(3, 2, RUNNERS_UP))
            assert bool((tokens[:3] != slots.drafts[:3, 1:4, None]).all())
    assert sum(sure > 0 for each in told for sure in each) > 3


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}])
def test_what_was_drafted_behind_an_alternate(sampling: dict[str, float]) -> None:
    """Of a model that drafts well it comes now and then; then two drafts are sure, and stand."""
    core = load_model(embedded_checkpoint(), dtype="float32", device=DEVICE)
    prompts = [core.tokenizer.encode(text) for text in ("def add(a, b):\n", "import os\n\n\nclass Files:\n")]
    params = [SamplingParams(max_new_tokens=80, ignore_eos=True, seed=n, **sampling) for n in range(2)]  # type: ignore[arg-type]
    plain = Noting(core, draft_len=8, proposals=3, alternates=11)
    came: list[Outcome] = []

    class Listening(Fixed):
        def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
            if came and len(came[-1].sure) == len(outcome.sure):
                assert all(n > sure for n, sure in zip(outcome.accepted, came[-1].sure, strict=True))
            came.append(outcome)

    engine = Engine(core, plain=DEVICE == "cpu")
    makers = lambda: TidarDecoder(core, draft_len=1), lambda: plain, lambda: FastDecoder(engine, Listening(8, 3, 11))
    texts = [[c.token_ids for c in generation.generate(core, prompts, params, make, 2)] for make in makers]
    assert texts[0] == texts[1] == texts[2]
    for outcomes_ in (plain.came, came):
        sure = [each for outcome in outcomes_ for each in outcome.sure]
        assert sure.count(2) > 3 and sure.count(1) > 3, "a fifth and a quarter of all steps"


def test_a_step_tries_what_came_next(leaning: CausalLM) -> None:
    engine = Engine(leaning, plain=DEVICE == "cpu")
    decoder = FastDecoder(engine, Fixed(4, 2, 3), ahead=1)
    with torch.inference_mode():
        decoder.prefill(PROMPTS, [SamplingParams(max_new_tokens=50)] * 3)
        decoder.step()
        slots = decoder._slots
        step = Step(engine.network, slots, Shape(4, 2, 4, 3), decoder._flags)
        named, behind = (each.clone() for each in engine.network.lists(slots, 3, ranked=True).runners.best())
        below, rank = proposals.alternates(outcomes(slots.chances[:3, 1:4]), 3)
        step()
    assert bool(named[:3].any())
    row = torch.arange(3, device=DEVICE)[:, None]
    assert torch.equal(step._levels[:3, :4], paired(below, below, 1))
    wanted = paired(named[row, below - 1, rank], behind[row, below - 1, rank], 1)
    assert torch.equal(step._alternates[:3], wanted)


# --- plans ---


def test_alternates_fill_tiles() -> None:
    for k, count in ((16, 2), (16, 3), (16, 6), (8, 3), (8, 2), (4, 2), (5, 2)):
        plan = filled(k, count)
        shape = shapes(plan)[0]
        assert (shape.pairs, shape.others) == (plan.alternates // 2, plan.alternates + plan.alternates // 2)
        assert shape.queries == k * (1 + count) + shape.others
        assert 4 <= plan.alternates <= 16
        more = dataclasses.replace(plan, alternates=plan.alternates + 1)
        assert plan.alternates == 16 or -(-shapes(more)[0].queries // 16) > -(-shape.queries // 16), "no room left"
    named = [(p.proposals, p.alternates) for p in few(16) if p.draft_len == 16 and p.method == "tidar"]
    assert named == [(15, 0), (3, 0), (2, 0), (1, 0), (3, 11), (2, 11)]
    assert any(p.alternates for p in candidates(16)) and not any(p.alternates for p in few(16) if p.method != "tidar")
    assert (drafted(1), drafted(2, 1), drafted(3, 4)) == (
        "1 proposal",
        "2 proposals, 1 alternate",
        "3 proposals, 4 alternates",
    )


def test_what_alternates_are_worth_is_learned() -> None:
    seen = Acceptance()
    believed = [seen.sure(n)[0] for n in range(33)]
    assert believed[0] == 0 and believed == sorted(believed) and 0.15 < believed[1] < 0.25 and 0.4 < believed[8] < 0.6
    assert 0.1 < seen.sure(8)[1] < believed[4] < believed[32] < 0.97
    import numpy as np

    for _ in range(300):
        seen.tried(2, np.array([0, -1, 1, -1]), np.array([2, 0, 1, 0]))
        seen.tried(2, np.array([0, -1, 1, -1]), np.array([1, 0, 1, 0]))
    assert seen.sure(1) == pytest.approx((0.25, 0), abs=0.01)
    assert seen.sure(2) == pytest.approx((0.5, 0.125), abs=0.01)
    assert seen.sure(3)[0] > 0.5, "what was not tried is believed as before"
    cover = seen.cover((Plan("tidar", 8, 2, 2), Plan("tidar", 8, 2)))
    assert np.array([cover.sure, cover.second]).T.tolist() == [list(seen.sure(2)), [0, 0]]


def test_a_sure_draft_says_nothing_of_others() -> None:
    import numpy as np

    told, apart = Acceptance(), Acceptance()
    kinds, counts, accepted = np.array([1, 1, 0, 2]), np.array([3, 3, 3, 1]), np.array([2, 0, 1, 1])
    told.update(kinds, counts, accepted, np.array([2, 0, 1, 2]))
    apart.update(kinds, counts, accepted)
    change = apart._told - told._told
    wanted = np.zeros_like(change)
    for kind, place in ((1, 1), (1, 2), (0, 1), (2, 1)):  # the last had one draft
        wanted[kind, place] = wanted[3 + kind, place] = 1
    assert change == pytest.approx(wanted)
    alone = Acceptance()
    alone.update(np.array([1]), np.array([1]), np.array([1]), np.array([2]))
    assert alone._told[:, 1:].sum() == 0, "as long as no draft was ever second"


def test_sure_drafts_are_counted_on() -> None:
    import numpy as np

    rates = np.full((3, 4), 0.5)
    rates[:, 0] = 1
    plan = Plan("tidar", 4, 4)
    none = tokens_per_step((plan,), rates, Cover(1.0, 1.0))
    assert none == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    some = tokens_per_step((plan,), rates, Cover(1.0, 1.0, 0.4, 0.2))
    assert some == pytest.approx(1 + 0.7 + (0.2 + 0.5 * 0.5) * 1.5)


def test_the_planner_tells_sure_drafts(leaning: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told of each alternate that came, and not that the draft behind it stood."""
    tried: list[tuple[int, list[int], list[int]]] = []
    sure: list[list[int]] = []

    def trying(self: Acceptance, n: int, met: Any, told: Any, steps: int) -> None:
        tried.append((n, met.tolist(), told.tolist()))

    monkeypatch.setattr(Acceptance, "tried", trying)
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
    policy.learn(shape, Outcome([1, 2], [0, 0], [0, 1], [0, -1], [2, 0]))
    policy.learn(shape, Outcome([3, 4], [0, 1], [0, 1], [-1, 2], [0, 1]))
    policy.learn(shape, Outcome([4, 4], [0, 3], [0, 1], [-1, -1], [0, 0]))
    policy.learn(shape, Outcome([1, 1], [0, 0], [0, 0], [1, -1], [1, 0]))
    assert tried == [(3, [0, -1], [2, 0]), (3, [-1, 2], [0, 1]), (3, [-1, -1], [0, 0]), (3, [1], [1])], "with drafts"
    assert sure == [[0, 0], [2, 0], [0, 1], [0]]


def test_counts_are_checked(qwen3: Model) -> None:
    for wrong in (-1, 33, 1.5, True, None):
        with pytest.raises(TidarError, match="alternates must be a number between 0 and 32"):
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
        make = lambda: FastDecoder(engine, Fixed(4, 3, 9))  # noqa: E731
        return generation.generate(leaning, [prompt], params, make, 1)[0].forwards

    alone = [forwards(prompt) for prompt in PROMPTS]
    assert [forwards(prompt) for prompt in PROMPTS[::-1]] == alone[::-1]
    lists = engine.network.lists(engine._slots[0][0], 3, ranked=True)
    assert bool(lists.runners.best()[0].any())
    with torch.inference_mode():
        engine._slots[0][0].open(PROMPTS[:1], params, [9], [[1]])
    assert not any(bool(each.any()) for each in lists.runners.best())
