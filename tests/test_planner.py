"""The planner's arithmetic against simulation, its choices on made-up machines, and that no choice changes a token."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tidar.api import Model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.plan import AR, Plan, Shape, candidates, few, shapes
from tidar.decode.planned import PlannedDecoder, measure
from tidar.decode.planner import (
    DOUBT,
    FELL,
    FRESH,
    TAIL,
    TAILS,
    Acceptance,
    Clock,
    Counts,
    Measured,
    Rates,
    Times,
    best,
    speed,
    tokens_per_step,
)
from tidar.decode.policy import REPLAN, Planning
from tidar.errors import TidarError

PROMPTS = [list(b"def f(x):\n    return x"), list(b"a"), list(b"class A:\n")]
FALLING = np.array(
    [
        [1, 0.6, 0.7, 0.75, 0.7, 0.6, 0.6, 0.5],
        [1, 0.9, 0.8, 0.75, 0.7, 0.6, 0.6, 0.5],
        [1, 0.7, 0.8, 0.7, 0.6, 0.6, 0.5, 0.5],
    ]
)
FLAT = Times([(1, 1.0), (1000, 1.0)])


def even(rate: float, longest: int) -> Rates:
    return np.array([[1.0] + [rate] * (longest - 1)] * 3)


def quickest(plans: Sequence[Plan], rates: Rates, times: Clock, keep: Plan) -> Plan:
    return best({plan: speed(plan, rates, times) for plan in plans}, keep)


def simulated(plan: Plan, rates: Rates, steps: int) -> float:
    """Tokens a step, drafts accepted by chance."""
    draw, made, behind, fell = random.Random(0), 0, 0, False
    k = plan.draft_len
    for _ in range(steps):
        n, kind = 1, 2 if behind else 0 if fell else 1
        while behind + n < k and draw.random() < rates[kind, n]:
            n += 1
        made += n
        level = n if plan.method == "linear" else max((j for j in plan.proposals if j <= n), default=None)
        behind, fell = k - 1 if level is None else min(n - level, k - 1), n == 1
    return made / steps


@pytest.mark.parametrize("proposals", [(1,), (8,), (1, 2), (2, 5), (1, 2, 4, 8), tuple(range(1, 9))])
@pytest.mark.parametrize("rates", [FALLING, even(0.3, 8), even(1, 8)], ids=["falling", "poor", "perfect"])
def test_tokens_per_step(proposals: tuple[int, ...], rates: Rates) -> None:
    plan = Plan("tidar", 8, proposals)
    assert tokens_per_step(plan, rates) == pytest.approx(simulated(plan, rates, 60_000), rel=0.02)


def test_tokens_per_step_of_the_others() -> None:
    assert tokens_per_step(AR, FALLING) == 1
    linear = Plan("linear", 3)
    assert tokens_per_step(linear, FALLING) == pytest.approx((simulated(linear, FALLING, 60_000) + 1) / 2, rel=0.02)
    one = np.stack([FALLING[1], FALLING[1], FALLING[2]])  # what stood before does not count
    assert tokens_per_step(linear, one) == pytest.approx((1 + 0.9 + 0.9 * 0.8 + 1) / 2)
    assert tokens_per_step(Plan("tidar", 3, (1, 2, 3)), one) == pytest.approx(1 + 0.9 + 0.9 * 0.8)


def test_choices() -> None:
    plans = list(candidates(16))
    assert len(plans) == len(set(plans))
    good = even(0.9, 16)
    assert quickest(plans, good, FLAT, AR) == Plan("tidar", 16, tuple(range(1, 17)))  # queries cost nothing
    assert quickest(plans, good, Times([(1, 1.0), (2, 2.0)]), Plan("linear", 4)) == AR  # all they can
    middling = quickest(plans, good, Times([(1, 1.0), (64, 1.3), (300, 9.0)]), AR)
    assert middling.method == "linear" or len(middling.proposals) < middling.draft_len
    assert quickest(plans, even(0.01, 16), FLAT, AR) == AR  # clearly better, or it stays
    assert quickest(plans, good, FLAT, Plan("tidar", 16, tuple(range(1, 17)))).draft_len == 16


def test_the_tail_of_one_proposal_may_be_enough() -> None:
    """Where queries are dear one proposal serves all places if its tail stands, and all of them if it does not."""
    plans, dear = list(few(16)), Times([(1, 1.0), (16, 1.5), (32, 1.5), (80, 1.9), (256, 2.1)])
    firm, poor = even(0.85, 16), even(0.85, 16)
    poor[2, 1:] = 0.1
    assert quickest(plans, firm, dear, AR) == Plan("tidar", 16, (1,))
    assert len(quickest(plans, poor, dear, AR).proposals) >= 8


def test_the_shortest_draft_has_no_plan_but_ar() -> None:
    assert set(candidates(1)) == {AR}


def saw(seen: Acceptance, *rows: tuple[int, int, int]) -> None:
    """What a step found, row by row: kind, count, accepted."""
    seen.update(*(np.array(column) for column in zip(*rows, strict=True)))


def test_acceptance_is_what_was_seen_lately() -> None:
    seen = Acceptance()
    supposed = np.array([[0.7], [0.7], [0.7 * TAIL]])
    assert seen.rates(4)[:, 1:] == pytest.approx(np.tile(supposed, 3))
    for _ in range(300):
        saw(seen, (FRESH, 3, 1), (FRESH, 3, 3), (FELL, 2, 0), (TAILS, 2, 0), (TAILS, 2, 1))
    fell, fresh, tail = seen.rates(4)
    assert fell[:2] == pytest.approx([1, 0], abs=0.03)
    assert fresh == pytest.approx([1, 1, 1 / 2, 1], abs=0.03)
    assert tail[:3] == pytest.approx([1, 1 / 2, 0], abs=0.03), "wherever it begins"
    assert 0.5 < seen.rates(6)[1, 5] < 1, "never seen: like the others"
    for _ in range(300):
        saw(seen, (FRESH, 3, 0))
    assert seen.rates(4)[1, 1] < 0.03


def test_rows_of_a_step_count_one_by_one() -> None:
    """Whole arrays at a time say what each row would say alone, in a step that forgets once."""
    draw = random.Random(0)
    together, apart = Acceptance(), np.zeros((2, 3, 9))
    for _ in range(40):
        rows = [(draw.randrange(3), count := draw.randint(1, 8), draw.randint(0, count)) for _ in range(5)]
        saw(together, *rows)
        apart *= np.array([[0.98 if kind in {k for k, *_ in rows} else 0.995] for kind in range(3)])
        for kind, count, accepted in rows:
            apart[0, kind, 1 : min(accepted + 1, count) + 1] += 1
            apart[1, kind, 1 : accepted + 1] += 1
    width = together._told.shape[1]
    assert together._told == pytest.approx(apart.reshape(6, 9)[:, :width])


def test_kinds_that_a_plan_has_not_are_supposed_from_those_that_it_has() -> None:
    """With one proposal fresh drafts are those of hard places only: what more proposals would make is not judged by
    them, and what was once judged is asked again."""
    seen = Acceptance()
    for _ in range(200):
        saw(seen, (FELL, 8, 1), (TAILS, 8, 6))
    fell, fresh, tail = seen.rates(8)
    assert fell[2] < 0.1 and tail[2] > 0.9, "as seen"
    assert (fresh[1:] > 0.85).all() and (fresh[1:] <= 0.97).all(), "as tails are, and better"
    for _ in range(100):
        saw(seen, (FRESH, 8, 0))
    assert seen.rates(8)[1, 1] < 0.1
    for _ in range(100):
        saw(seen, (TAILS, 8, 6))
    assert seen.rates(8)[1, 1] < 0.2, "not forgotten at once"
    for _ in range(2000):
        saw(seen, (TAILS, 8, 6))
    assert seen.rates(8)[1, 1] > 0.8


def test_times() -> None:
    def step(queries: int) -> Shape:
        return Shape(queries, (), queries)

    times = Times([(8, 3.0), (1, 1.0), (16, 2.0)])
    assert [times(step(q)) for q in (1, 8, 12)] == [1 * DOUBT, 3 * DOUBT, 3 * DOUBT], "more queries never take less"
    rising = Times([(1, 1.0), (3, 2.0)])
    assert rising(step(2)) == 1.5 * DOUBT and rising(step(7)) == 4.0 * DOUBT
    rising.update(step(2), 500.0)
    assert not rising.sure_of(step(2)) and rising(step(3)) < 500, "one stall"
    for _ in range(20):
        rising.update(step(2), 6.0)
    rising.update(step(2), 500.0)
    assert rising.sure_of(step(2)) and rising(step(2)) == 6.0
    assert rising(step(7)) == 16.0 * DOUBT, "what takes four times as long here does so elsewhere"


def test_steps_of_as_many_queries_are_told_apart_where_each_is_measured() -> None:
    verify, drafts = Shape(16, (), 16), Shape(4, (1, 2, 3), 4)
    times = Measured({verify: 1.0, drafts: 1.5})
    assert (times(verify), times(drafts), times(Shape(8, (1,), 8))) == (1.0, 1.5, float("inf"))
    assert times.ready(drafts) and not times.ready(Shape(8, (1,), 8))


class Restless(PlannedDecoder):
    """Another plan every step; notes which drafts there were and what became of them."""

    def __init__(self, *args: object, plans: Sequence[Plan], **kwargs: object) -> None:
        super().__init__(*args, times={n: Times([(1, 1.0), (2, 1.0)]) for n in (1, 2, 3)}, **kwargs)  # type: ignore[arg-type]
        self.random, self.plans, self.used = random.Random(1), list(plans), set[str]()
        self.right: list[list[tuple[bool, int]]] = []  # whether they are tails, and how many
        self.noted: list[list[tuple[bool, int]]] = []
        self.seen_rows: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        self._offsets = [list(range(1, self.draft_len)) for _ in prompts]
        return super().prefill(prompts, params)

    def step(self) -> list[list[int]]:
        self.policy.plan = self.random.choice(self.plans)
        shape = self.shape()
        self.used.add(self.policy.plan.method if shape.drafts > 1 or not shape.proposals else "draft")
        self.right.append([(o[0] > 1, len(o[: shape.drafts - 1])) for o in self._offsets if o[: shape.drafts - 1]])
        self.noted.append([])
        return super().step()

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self._offsets = [self._offsets[r] for r in rows]

    def _proposal(self, masks: torch.Tensor, accepted: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, made = super()._proposal(masks, accepted, shape)
        levels = [max((j for j in shape.proposals if j <= n), default=0) for n in accepted.tolist()]
        self._offsets = [
            [int(n) - level + place for place in range(1, len(row) + 1) if row[place - 1]]
            for n, level, row in zip(accepted.tolist(), levels, made.tolist(), strict=True)
        ]
        return hidden, made


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_no_plan_changes_a_token(qwen3: Model, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [p for p in candidates(6) if p.draft_len in (1, 2, 4, 6)]
    params = [SamplingParams(max_new_tokens=90, seed=s, **options) for s in range(3)]  # type: ignore[arg-type]
    expected = qwen3.generate(PROMPTS, params, method="ar")
    decoder = Restless(qwen3.core, draft_len=6, plans=plans)
    real = Acceptance.update

    def noting(self: Acceptance, kinds: Counts, counts: Counts, accepted: Counts) -> None:
        decoder.noted[-1] = [
            (kind == TAILS, count) for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True)
        ]
        assert (accepted >= 0).all() and (accepted <= counts).all()
        real(self, kinds, counts, accepted)

    monkeypatch.setattr(Acceptance, "update", noting)
    found = generation.generate(qwen3.core, PROMPTS, params, lambda: decoder, 3)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert decoder.used == {"ar", "linear", "tidar", "draft"}
    assert decoder.noted == decoder.right, "what it learns from is not what was drafted"


def test_it_settles_on_what_is_quick(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # every step takes 1
    decoder = PlannedDecoder(qwen3.core, draft_len=4, times={n: Times([(1, 1.0), (2, 1.0)]) for n in (1, 2, 3)})
    params = [SamplingParams(max_new_tokens=200, ignore_eos=True)]
    generation.generate(qwen3.core, PROMPTS[:1], params, lambda: decoder, 1)
    assert decoder.policy.plan.method == "tidar"
    dear = Times([(1, 1.0), (2, 50.0)])
    for _ in range(3):
        dear.update(Shape(1, (), 1), 1.0)
    slow = PlannedDecoder(qwen3.core, draft_len=4, times={1: dear})
    monkeypatch.setattr(Times, "update", lambda self, shape, seconds: None)
    shapes: list[Shape] = []
    real = Planning.learn

    def noting(self: Planning, shape: Shape, accepted: list[int], seconds: float) -> None:
        shapes.append(shape)
        real(self, shape, accepted, seconds)

    monkeypatch.setattr(Planning, "learn", noting)
    generation.generate(qwen3.core, PROMPTS[:1], params, lambda: slow, 1)
    assert slow.policy.plan == AR
    last = shapes[-140:]
    probe = last.index(Shape(1, (1,), 4))
    assert last[probe + 1] == Shape(4, (), 4), "it asks again whether drafts have become better, and looks"
    assert last.count(Shape(1, (), 1)) > 0.9 * len(last)


def test_only_what_is_ready_is_asked_for() -> None:
    """A change of plan goes through steps that were measured, whatever drafts are at hand."""
    plans = list(few(16))
    ready = {shape for plan in plans for shape in shapes(plan)} | {Shape(1, (1,), k) for k in (16, 8, 4)}
    policy = Planning(16, plans)
    policy.open(1)
    policy.begin(lambda _: Measured(dict.fromkeys(ready, 1.0)))
    chance, held, taken = random.Random(0), 16, set()
    for _ in range(600):
        policy.plan = chance.choice(plans)
        for _ in range(3):
            shape = policy.shape(held)
            assert shape in ready and shape.drafts <= held
            policy.learn(shape, [chance.randint(1, shape.drafts)])
            held = shape.masks if shape.proposals else 1
            taken.add(shape)
    assert taken == ready


def test_a_look_is_spread_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for a look at all plans, and every plan is looked at within `REPLAN` steps."""
    for plans in (list(few(16)), list(candidates(32))):
        policy = Planning(16, plans)
        policy.open(1)
        policy.begin(lambda _: Times([(1, 1.0), (1000, 1.0)]))
        looked: list[Plan] = []

        def noting(plan: Plan, *_: object, looked: list[Plan] = looked) -> float:
            looked.append(plan)
            return tokens_per_step(plan, even(0.9, 33))

        monkeypatch.setattr("tidar.decode.policy.speed", noting)
        most = -(-len(plans) // REPLAN)
        for step in range(1, REPLAN + 2):
            policy.learn(Shape(1, (), 1), [1])
            assert len(looked) <= step * most
        assert set(looked) == set(plans)
        assert policy.plan == best({plan: noting(plan) for plan in plans}, policy.plan)


def test_measured_times_are_usable(qwen3: Model) -> None:
    points = measure(qwen3.core, 2)
    assert [q for q, _ in points] == [1, 8, 48]
    assert all(s > 0 for _, s in points)


def test_what_does_not_go_together_is_refused(qwen3: Model) -> None:
    for wrong in ({"proposals": [1]}, {"beta": 0.5}, {"acceptance": "ratio"}):
        with pytest.raises(TidarError, match="method 'auto'"):
            qwen3.generate(PROMPTS, method="auto", **wrong)
    with pytest.raises(TidarError, match="method 'linear' takes no proposals"):
        qwen3.generate(PROMPTS, method="linear", proposals=[1])
    with pytest.raises(TidarError, match="method 'fast' is unknown: use one of ar, tidar, linear, auto"):
        qwen3.generate(PROMPTS, method="fast")  # type: ignore[arg-type]


def test_times_are_measured_once(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def noting(_: object, rows: int) -> list[tuple[int, float]]:
        calls.append(rows)
        return [(1, 1.0), (2, 1.0)]

    monkeypatch.setattr("tidar.decode.planned.measure", noting)
    model = Model(qwen3.core)
    for prompts in (PROMPTS[:1], PROMPTS[:1], PROMPTS):
        model.generate(prompts, SamplingParams(max_new_tokens=4))
    assert calls == [1, 3]
