"""The planner's arithmetic against simulation, its choices on made-up machines, and that no choice changes a token."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tidar.api import Model
from tidar.config import SamplingParams
from tidar.decode import generation
from tidar.decode.clock import DOUBT, Clock, Measured, Times
from tidar.decode.plan import AR, SINGLE, Outcome, Plan, Shape, candidates, few, shapes
from tidar.decode.planned import PlannedDecoder, measure
from tidar.decode.planner import (
    BELOW,
    FIRM,
    FORGET,
    FRESH,
    PRIOR,
    TAIL,
    TAILS,
    UNLIKELY,
    Acceptance,
    Counts,
    Cover,
    Plans,
    Rates,
    best,
    likeliest,
    speeds,
    tokens_per_step,
)
from tidar.decode.policy import ABREAST, REPLAN, Planning
from tidar.decode.tidar import _Picked
from tidar.errors import TidarError
from tidar.proposals import outcomes

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


def even_cover(covered: float) -> Cover:
    return Cover(covered, covered)


def tokens(plan: Plan, rates: Rates, cover: Cover) -> float:
    return float(tokens_per_step((plan,), rates, cover)[0])


def quickest(
    plans: Sequence[Plan], rates: Rates, times: Clock, keep: Plan, cover: Callable[[Plan], Cover] | None = None
) -> Plan:
    told = cover or (lambda plan: Acceptance().cover((plan,)))
    found = [speeds((plan,), rates, told(plan), times) for plan in plans]
    return best({plan: each for one in found for plan, each in one.items()}, keep)


def simulated(plan: Plan, rates: Rates, cover: Cover, steps: int) -> float:
    """Tokens a step, drafts accepted by chance, and what comes likely or drafted for by chance: proposals that know
    nothing of it lie evenly among 1 … K, and two thirds as often above it as that says."""
    draw, made, behind, unlikely = random.Random(0), 0, 0, False
    k = plan.draft_len
    gap = max(1, round((k - plan.proposals) / (plan.proposals + 1)))
    for _ in range(steps):
        n, kind = 1, 2 if behind else 0 if unlikely else 1
        likely, covered = (float(np.broadcast_to(each, k + 1)[k if kind == 1 else behind]) for each in cover[:2])
        luck = draw.random()
        sure = (luck < cover.sure) + (luck < cover.second)
        while behind + n < k and (n <= sure or draw.random() < rates[kind, n]):
            n += 1
        made += n
        came = draw.random()
        behind, unlikely = 0, came >= likely
        if came >= covered:
            nothing = n == 1 or draw.random() < BELOW / (plan.proposals + 1)
            behind = k - 1 if nothing else min(k - 1, draw.randint(1, min(gap, n - 1)))
    return made / steps


RISING = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.6])
"""Of each state, the last of them fresh drafts behind what was likely."""


@pytest.mark.parametrize(
    "cover",
    [(1, 1), (0.6, 1), (0.6, 0.6), (0.3, 0.8), (0, 0), (RISING / 2, RISING), (0.3, 0.8, 0.5, 0.2), (1, 1, 1, 1)],
)
@pytest.mark.parametrize("proposals", [1, 2, 5, 7, 8])
@pytest.mark.parametrize("rates", [FALLING, even(0.3, 8), even(1, 8)], ids=["falling", "poor", "perfect"])
def test_tokens_per_step(proposals: int, rates: Rates, cover: tuple[Any, ...]) -> None:
    plan = Plan("tidar", 8, proposals)
    expected = simulated(plan, rates, Cover(*cover), 60_000)
    assert tokens(plan, rates, Cover(*cover)) == pytest.approx(expected, rel=0.02)


def test_more_is_made_where_more_is_drafted_for() -> None:
    for count in (1, 3, 6):
        for covers in ([even_cover(share) for share in (0.0, 0.3, 0.7, 1.0)], [Cover(n, 1.0) for n in (0, 0.4, 1)]):
            made = [tokens(Plan("tidar", 8, count), FALLING, cover) for cover in covers]
            assert made == sorted(made) and made[0] < 0.9 * made[-1]


def test_tokens_per_step_of_the_others() -> None:
    assert tokens(AR, FALLING, even_cover(1)) == 1
    linear, most = Plan("linear", 3), Cover(0.7, 1.0)
    assert tokens(linear, FALLING, most) == pytest.approx((simulated(linear, FALLING, most, 60_000) + 1) / 2, rel=0.02)
    one = np.stack([FALLING[1], FALLING[1], FALLING[2]])  # what stood before does not count
    assert tokens(linear, one, most) == pytest.approx((1 + 0.9 + 0.9 * 0.8 + 1) / 2)
    assert tokens(Plan("tidar", 3, 3), one, most) == pytest.approx(1 + 0.9 + 0.9 * 0.8)


def test_choices() -> None:
    plans = list(candidates(16))
    assert len(plans) == len(set(plans))
    good = even(0.9, 16)
    assert quickest(plans, good, FLAT, AR) == Plan("tidar", 16, 16)  # queries cost nothing
    assert quickest(plans, good, Times([(1, 1.0), (2, 2.0)]), Plan("linear", 4)) == AR  # all they can
    middling = quickest(plans, good, Times([(1, 1.0), (64, 1.3), (300, 9.0)]), AR)
    assert middling.method == "linear" or middling.proposals < middling.draft_len
    poor = [plan for plan in plans if not plan.alternates]
    assert quickest(poor, even(0.01, 16), FLAT, AR) == AR  # clearly better, or it stays
    assert quickest(plans, good, FLAT, Plan("tidar", 16, 16)).draft_len == 16


def test_how_many_proposals_are_enough() -> None:
    """Where queries are dear: one if it is known what will come, nearly all if nothing is; and fewer where tails
    stand."""
    plans, dear = list(few(16)), Times([(1, 1.0), (16, 1.5), (32, 1.5), (80, 1.9), (256, 2.1)])
    firm, poor = even(0.85, 16), even(0.85, 16)
    poor[2, 1:] = 0.1

    def nothing(plan: Plan) -> Cover:
        return even_cover(plan.proposals / plan.draft_len if plan.method == "tidar" else 1.0)

    assert quickest(plans, firm, dear, AR, lambda _: even_cover(1.0)) == Plan("tidar", 16, 1)
    assert quickest(plans, firm, dear, AR, nothing) == Plan("tidar", 16, 15)
    long = [plan for plan in plans if plan.draft_len == 16]
    assert quickest(long, firm, dear, AR).proposals < quickest(long, poor, dear, AR).proposals < 15


def test_the_shortest_draft_has_no_plan_but_ar() -> None:
    assert set(candidates(1)) == {AR}


def saw(seen: Acceptance, *rows: tuple[int, int, int]) -> None:
    """What a step found, row by row: kind, count, accepted."""
    kinds, counts, accepted = (np.array(column) for column in zip(*rows, strict=True))
    seen.update(kinds, counts, accepted)


def test_acceptance_is_what_was_seen_lately() -> None:
    seen = Acceptance()
    supposed = np.array([[0.7 * TAIL], [0.7], [0.7 * TAIL * TAIL]])
    assert seen.rates(4)[:, 1:] == pytest.approx(np.tile(supposed, 3))
    for _ in range(300):
        saw(seen, (FRESH, 3, 1), (FRESH, 3, 3), (UNLIKELY, 2, 0), (TAILS, 2, 0), (TAILS, 2, 1))
    unlikely, fresh, tail = seen.rates(4)
    assert unlikely[:2] == pytest.approx([1, 0], abs=0.03)
    assert fresh == pytest.approx([1, 1, 1 / 2, 1], abs=0.03)
    assert tail[:3] == pytest.approx([1, 1 / 2, 0], abs=0.03), "wherever it begins"
    assert 0.5 < seen.rates(6)[1, 5] < 1, "never seen: like the others"
    for _ in range(300):
        saw(seen, (FRESH, 3, 0))
    assert seen.rates(4)[1, 1] < 0.03


def drafted(seen: Acceptance, plan: Plan) -> float:
    """Of all drafts, fresh ones."""
    cover, k = seen.cover((plan,)), plan.draft_len
    (likely,), (covered,) = np.asarray(cover.likely), np.asarray(cover.drafted)
    assert likely.shape == covered.shape == (k + 1,) and likely[k] == likely[0] and covered[k] == covered[0]
    most = Plan("tidar", k, int(likeliest(np.array(k))))
    assert likely[k] == min(covered[k], np.asarray(seen.cover((most,)).drafted)[0, k])
    assert likely[k - 1] == covered[k - 1] == pytest.approx(1), "where nothing is drafted it is known what comes"
    return float(covered[k])


def test_covered_is_what_was_seen_lately() -> None:
    seen, draw = Acceptance(), random.Random(0)
    alone = Plan("tidar", 8, 1)
    assert drafted(seen, alone) == pytest.approx(0.6, abs=0.02)
    assert drafted(seen, Plan("tidar", 16, 1)) == pytest.approx(0.37, abs=0.02)
    rising = [drafted(seen, Plan("tidar", 16, count)) for count in range(1, 17)]
    assert rising == sorted(rising) and rising[-1] == 1.0
    for _ in range(400):
        seen.placed(np.array([8, 8]), np.array([0, 3]))
    for count, share in ((1, 1 / 2), (3, 1 / 2), (4, 1), (8, 1)):
        assert drafted(seen, Plan("tidar", 8, count)) == pytest.approx(share, abs=0.01)
    # What was seen with 8 drafts serves others; the halves of a place as likely as each other.
    for count, share in ((1, 1 / 4), (2, 1 / 2), (6, 1 / 2), (7, 3 / 4), (8, 1)):
        assert drafted(seen, Plan("tidar", 16, count)) == pytest.approx(share, abs=0.01)
    assert drafted(seen, Plan("tidar", 4, 1)) == pytest.approx(1 / 2, abs=0.01)
    for _ in range(400):
        seen.placed(np.array([16]), np.array([draw.randrange(16)]))
    for count in range(1, 16):
        assert drafted(seen, Plan("tidar", 16, count)) == pytest.approx(count / 16, abs=0.15)
    assert drafted(seen, AR) == drafted(seen, Plan("linear", 8)) == drafted(seen, Plan("tidar", 8, 8)) == 1


def test_fewer_drafts_have_fewer_outcomes() -> None:
    """A tail of two drafts ends in three ways, of which two proposals are for two."""
    seen = Acceptance()
    for _ in range(600):
        seen.placed(np.full(6, 6), np.arange(6))
    cover = seen.cover((Plan("tidar", 6, 2), Plan("linear", 6)))
    (drafted, every), (likely, _) = np.asarray(cover.drafted), np.asarray(cover.likely)
    assert drafted == pytest.approx(np.array([2 / 6, 2 / 5, 2 / 4, 2 / 3, 1, 1, 2 / 6]), abs=0.01)
    assert likely == pytest.approx(np.array([2 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1, 2 / 6]), abs=0.01)
    assert every == pytest.approx(np.ones(7))


def test_outcomes_count_one_by_one() -> None:
    """By hand: each row as much as another, each step a little less than the next."""
    draw, steps = random.Random(1), 30
    seen, hits, asked = Acceptance(), np.zeros(9), 0.0
    before = [drafted(seen, Plan("tidar", 8, count)) for count in range(1, 9)]
    for _ in range(steps):
        places = [draw.randrange(8) for _ in range(draw.randint(1, 4))]
        seen.placed(np.full(len(places), 8), np.array(places))
        hits *= FORGET
        for place in places:
            hits[place + 1 :] += 1
        asked = FORGET * asked + len(places)
    left = PRIOR[1] * FORGET**steps  # of what was believed
    for count in range(1, 9):
        share = (hits[count] + left * before[count - 1]) / (asked + left)
        assert drafted(seen, Plan("tidar", 8, count)) == pytest.approx(share)


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
    """With few proposals fresh drafts are behind likely outcomes only: what more proposals would make is not judged by
    them but by tails, and what was once judged is asked again."""
    seen = Acceptance()
    for _ in range(200):
        saw(seen, (FRESH, 8, 8), (TAILS, 8, 1))
    unlikely, fresh, tail = seen.rates(8)
    assert fresh[2] > 0.9 and tail[2] < 0.1, "as seen"
    assert 0.3 < unlikely[3] < 0.7, "as tails are, and better"
    for _ in range(100):
        saw(seen, (UNLIKELY, 8, 8))
    assert seen.rates(8)[0, 1] > 0.9
    for _ in range(100):
        saw(seen, (TAILS, 8, 0))
    assert seen.rates(8)[0, 1] > 0.8, "not forgotten at once"
    for _ in range(2000):
        saw(seen, (TAILS, 8, 0))
    assert seen.rates(8)[0, 1] < 0.2


def test_times() -> None:
    def step(queries: int) -> Shape:
        return Shape(queries, 0, queries)

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
    verify, drafts = Shape(16, 0, 16), Shape(4, 3, 4)
    times = Measured({verify: 1.0, drafts: 1.5})
    assert (times(verify), times(drafts), times(Shape(8, 1, 8))) == (1.0, 1.5, float("inf"))
    assert times.ready(drafts) and not times.ready(Shape(8, 1, 8))


class Restless(PlannedDecoder):
    """Another plan every step; notes which drafts there were and what became of them."""

    def __init__(self, *args: object, plans: Sequence[Plan], **kwargs: object) -> None:
        super().__init__(*args, times={n: Times([(1, 1.0), (2, 1.0)]) for n in (1, 2, 3)}, **kwargs)  # type: ignore[arg-type]
        self.random, self.plans, self.used = random.Random(1), list(plans), set[str]()
        self.right: list[list[tuple[bool, int]]] = []  # whether they are tails, and how many
        self.noted: list[list[tuple[bool, int]]] = []
        self.came: list[list[int]] = []  # places of outcomes, by hand
        self.placed: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        self._offsets = [list(range(1, self.draft_len)) for _ in prompts]
        return super().prefill(prompts, params)

    def step(self) -> list[list[int]]:
        self.policy.plan = self.random.choice(self.plans)
        shape = self.shape()
        self.used.add(self.policy.plan.method if shape.drafts > 1 or not shape.proposals else "draft")
        self.right.append([(o[0] > 1, len(o[: shape.drafts - 1])) for o in self._offsets if o[: shape.drafts - 1]])
        self.noted.append([])
        tested = [row for row, o in enumerate(self._offsets) if o[: shape.drafts - 1]]
        whole = [row for row in tested if self._offsets[row][0] == 1]
        likely = outcomes(self._chances[:, : shape.drafts - 1]).tolist()
        certain = super().step()
        order = [sorted(range(shape.drafts), key=lambda n, of=of: -of[n]) for of in likely]  # type: ignore[misc]
        if tested:
            self.came.append([order[row].index(len(certain[row]) - 1) for row in whole])
        return certain

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self._offsets = [self._offsets[r] for r in rows]

    def _proposal(
        self, masks: torch.Tensor, accepted: torch.Tensor, shape: Shape, picked: _Picked
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, made, behind = super()._proposal(masks, accepted, shape, picked)
        each = zip(accepted.tolist(), picked.levels.tolist(), strict=True)
        levels = [max((j for j in own if j <= n), default=0) for n, own in each]
        self._offsets = [
            [int(n) - level + place for place in range(1, len(row) + 1) if row[place - 1]]
            for n, level, row in zip(accepted.tolist(), levels, made.tolist(), strict=True)
        ]
        return hidden, made, behind


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_no_plan_changes_a_token(qwen3: Model, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [p for p in candidates(6) if p.draft_len in (1, 2, 4, 6)]
    params = [SamplingParams(max_new_tokens=90, seed=s, **options) for s in range(3)]  # type: ignore[arg-type]
    expected = qwen3.generate(PROMPTS, params, method="ar")
    decoder = Restless(qwen3.core, draft_len=6, plans=plans)
    real = Acceptance.update

    def noting(self: Acceptance, kinds: Counts, counts: Counts, accepted: Counts, *rest: Any) -> None:
        decoder.noted[-1] = [
            (kind == TAILS, count) for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True)
        ]
        assert (accepted >= 0).all() and (accepted <= counts).all()
        real(self, kinds, counts, accepted, *rest)

    def placing(self: Acceptance, among: Counts, places: Counts, steps: int) -> None:
        decoder.placed.append(places.tolist())
        assert (places >= 0).all() and (places < among).all(), "what nobody drafted is expected last"
        placed(self, among, places, steps)

    placed = Acceptance.placed
    monkeypatch.setattr(Acceptance, "update", noting)
    monkeypatch.setattr(Acceptance, "placed", placing)
    found = generation.generate(qwen3.core, PROMPTS, params, lambda: decoder, 3)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]
    assert decoder.used == {"ar", "linear", "tidar", "draft"}
    assert decoder.noted == decoder.right, "what it learns from is not what was drafted"
    assert decoder.placed == decoder.came and max(itertools.chain(*decoder.placed)) > 1


def test_it_settles_on_what_is_quick(qwen3: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # every step takes 1
    decoder = PlannedDecoder(qwen3.core, draft_len=4, times={n: Times([(1, 1.0), (2, 1.0)]) for n in (1, 2, 3)})
    params = [SamplingParams(max_new_tokens=200, ignore_eos=True)]
    generation.generate(qwen3.core, PROMPTS[:1], params, lambda: decoder, 1)
    assert decoder.policy.plan.method == "tidar"
    dear = Times([(1, 1.0), (2, 50.0)])
    for _ in range(3):
        dear.update(Shape(1, 0, 1), 1.0)
    slow = PlannedDecoder(qwen3.core, draft_len=4, times={1: dear})
    monkeypatch.setattr(Times, "update", lambda self, shape, seconds: None)
    shapes: list[Shape] = []
    real = Planning.learn

    def noting(self: Planning, shape: Shape, outcome: Outcome, seconds: float) -> None:
        shapes.append(shape)
        real(self, shape, outcome, seconds)

    monkeypatch.setattr(Planning, "learn", noting)
    generation.generate(qwen3.core, PROMPTS[:1], params, lambda: slow, 1)
    assert slow.policy.plan == AR
    last = shapes[-140:]
    probe = last.index(Shape(1, 1, 4))
    assert last[probe + 1] == Shape(4, 0, 4), "it asks again whether drafts have become better, and looks"
    assert last.count(Shape(1, 0, 1)) > 0.9 * len(last)


def came(shape: Shape, chance: random.Random) -> Outcome:
    """Anything that may come in a row."""
    n = chance.randint(1, shape.drafts)
    behind = chance.choice([*range(min(n, shape.masks)), shape.masks]) if shape.proposals else shape.masks
    met = chance.randrange(-1, shape.alternates)
    return Outcome([n], [behind], [chance.randrange(shape.drafts)], [met], [chance.randint(1, 2) if met >= 0 else 0])


class Told(Acceptance):
    """Notes what it was told, row after row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[tuple[Any, ...]]] = {"update": [], "placed": [], "tried": []}

    def update(self, kinds: Any, counts: Any, accepted: Any, sure: Any = None, steps: int = 1) -> None:
        self.rows["update"] += zip(*(each.tolist() for each in (kinds, counts, accepted, sure)), strict=True)
        super().update(kinds, counts, accepted, sure, steps)

    def placed(self, outcomes: Any, places: Any, steps: int = 1) -> None:
        self.rows["placed"] += zip(outcomes.tolist(), places.tolist(), strict=True)
        super().placed(outcomes, places, steps)

    def tried(self, alternates: int, met: Any, told: Any, steps: int = 1) -> None:
        self.rows["tried"] += [(alternates, *each) for each in zip(met.tolist(), told.tolist(), strict=True)]
        super().tried(alternates, met, told, steps)


@pytest.mark.parametrize("every", [2, 8, 100])
def test_steps_learnt_from_together_teach_the_same(every: int) -> None:
    """To the last one; and plans are looked at between."""
    chance = random.Random(every)
    some = [Shape(8, 3, 8, 4), Shape(8, 7, 8), Shape(1, 1, 8), Shape(8, 2, 8, 2), Shape(1, 0, 1), Shape(4, 0, 4)]
    steps: list[tuple[Shape, Outcome]] = []
    for shape in (chance.choice(some) for _ in range(4 * REPLAN + 3)):
        rows = [came(shape, chance) for _ in range(3)]
        steps.append((shape, Outcome(*([one[0] for one in each] for each in zip(*rows, strict=True)))))
    found = []
    for count in (1, every):
        told = Told()
        policy = Planning(8, acceptance=told, every=count)
        policy.open(3)
        policy.begin(lambda _: Measured({shape: 1 + shape.queries / 99 for plan in few(8) for shape in shapes(plan)}))
        policy.plan = AR
        for number, (shape, outcome) in enumerate(steps):
            if number == 2 * REPLAN:
                policy.select([0, 1, 2])
            policy.learn(shape, outcome)
        policy.close()
        found.append({name: sorted(rows) if name == "tried" else rows for name, rows in told.rows.items()})
        assert policy.plan != AR
    assert found[0] == found[1]
    assert all(found[0].values())


def test_only_what_is_ready_is_asked_for() -> None:
    """A change of plan goes through steps that were measured, whatever drafts are at hand."""
    plans = list(few(16))
    ready = {shape for plan in plans for shape in shapes(plan)} | {Shape(1, 1, k) for k in (16, 8, 4)}
    policy = Planning(16, plans)
    policy.open(1)
    policy.begin(lambda _: Measured(dict.fromkeys(ready, 1.0)))
    chance, held, taken = random.Random(0), 16, set()
    for _ in range(600):
        policy.plan = chance.choice(plans)
        for _ in range(3):
            shape = policy.shape(held)
            assert shape in ready and shape.drafts <= held
            policy.learn(shape, came(shape, chance))
            held = shape.masks if shape.proposals else 1
            taken.add(shape)
    assert taken == ready


def test_what_comes_of_no_drafts_is_no_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts behind a step that had none are as any fresh ones; the second of two forwards keeps what was found."""
    told: list[list[int]] = []
    monkeypatch.setattr(Acceptance, "update", lambda self, kinds, *_: told.append(kinds.tolist()))
    one, check, draft = Shape(16, 1, 16), Shape(16, 0, 16), Shape(1, 1, 16)
    unlikely, sure = Outcome([3], [16], [9], [-1], [0]), Outcome([1], [0], [0], [-1], [0])
    for steps in ([(one, unlikely), (one, sure), (one, sure)], [(check, unlikely), (draft, sure), (check, sure)]):
        policy = Planning(16, list(few(16)))
        policy.open(1)
        policy.begin(lambda _: Times([(1, 1.0), (1000, 1.0)]))
        for shape, outcome in steps:
            policy.learn(shape, outcome)
    assert told == [[FRESH], [FRESH], [FRESH], [UNLIKELY]]


def test_a_look_is_spread_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for a look at all plans, and every plan is looked at within `REPLAN` steps."""
    for plans in (list(few(16)), list(candidates(32))):
        policy = Planning(16, plans)
        policy.open(1)
        policy.begin(lambda _: Times([(1, 1.0), (1000, 1.0)]))
        looked: list[Plan] = []

        def noting(plans: Plans, *_: object, looked: list[Plan] = looked) -> dict[Plan, float]:
            looked.extend(plans)
            return {plan: tokens(plan, even(0.9, 33), even_cover(1.0)) for plan in plans}

        monkeypatch.setattr("tidar.decode.policy.speeds", noting)
        before = 0
        for _ in range(REPLAN + 1):
            policy.learn(Shape(1, 0, 1), Outcome([1], [1], [0], [-1], [0]))
            assert len(looked) - before <= ABREAST
            before = len(looked)
        assert set(looked) == set(plans)
        assert policy.plan == best(noting(tuple(plans)), policy.plan)
        policy.open(4)  # longer steps
        policy.begin(lambda _: Times([(1, 1.0), (1000, 1.0)]))
        looked.clear()
        for _ in range(REPLAN // 4):
            policy.learn(Shape(1, 0, 1), Outcome([1] * 4, [1] * 4, [0] * 4, [-1] * 4, [0] * 4))
        assert set(looked) == set(plans)


def test_rows_are_not_alike() -> None:
    """Each row's drafts stand as often as all rows' do, to a power of its own."""
    seen = Acceptance()
    for _ in range(200):
        seen.update(np.full(4, FRESH), np.full(4, 8), np.array([7, 7, 3, 0]))
    mean = (7 + 7 + 3 + 0) / (8 + 8 + 4 + 1)
    compared = np.array([80.0, 40.0, 10.0, 0.0])
    stood = compared * [mean, mean**2, 1.0, 0.0]
    powers = seen.eases(compared, stood)
    assert powers[0] == pytest.approx(1, abs=0.02) and 1.5 < powers[1] < 2 and powers[2] < 1
    assert powers[3] == pytest.approx(1, abs=1e-6), "nothing is known of it"
    assert (seen.eases(np.full(2, 1e9), np.array([0.0, 1e9])) == [5, 0.1]).all()
    one = seen.eases(np.array([FIRM]), np.array([FIRM]))  # as much as is believed
    assert one == pytest.approx(np.log((1 + mean) / 2) / np.log(mean), abs=0.02)


def test_sure_drafts_make_no_row_easy() -> None:
    """They stand in any row."""
    found = []
    for sure in (0, 1):
        policy, chance = Planning(8, [AR, Plan("tidar", 8, 8, 2)]), random.Random(0)
        policy.open(4)
        policy.begin(lambda _: Times([(1, 1.0), (1000, 1.0)]))
        for _ in range(400):
            stood = [next(n for n in range(sure, 8) if n == 7 or chance.random() > 0.5) for _ in range(4)]
            outcome = Outcome([1 + n for n in stood], [0] * 4, [0] * 4, [sure - 1] * 4, [sure] * 4)
            policy.learn(Shape(8, 8, 8, 2), outcome)
        found.append(policy.acceptance.spread.mean())
    assert found == pytest.approx([1, 1], abs=0.15)


def test_a_plan_is_judged_by_what_a_token_takes() -> None:
    plan, cover = Plan("tidar", 8, 3), even_cover(0.8)
    rates = [even(0.95, 8), even(0.4, 8)]
    fast, slow, both = (speeds((plan,), each, cover, lambda _: 0.5)[plan] for each in (*rates, np.stack(rates)))
    assert both == pytest.approx(2 / (1 / fast + 1 / slow)) and both < 0.9 * (fast + slow) / 2
    assert fast == pytest.approx(2 * tokens(plan, rates[0], cover))


def test_plans_are_looked_at_together() -> None:
    """Which tells what looking one by one tells."""
    seen = Acceptance()
    saw(seen, *[(FRESH, 15, 9), (UNLIKELY, 15, 2), (TAILS, 6, 4)] * 20)
    seen.tried(4, np.array([0, 2, -1]), np.array([2, 1, 0]))
    rates = seen.rates(16) ** np.array([0.4, 1.0, 2.0])[:, None, None]
    seconds = {shape: 1 + shape.queries / 99 for plan in few(16) for shape in shapes(plan)}
    for k in (16, 8, 4):
        plans = tuple(plan for plan in few(16) if plan.draft_len == k)
        together = speeds(plans, rates, seen.cover(plans), seconds.__getitem__)
        for plan in plans:
            assert speeds((plan,), rates, seen.cover((plan,)), seconds.__getitem__)[plan] == pytest.approx(
                together[plan]
            )
        assert len(set(together.values())) == len(plans) > 2


def test_slow_rows_count() -> None:
    """Rows whose drafts always or never stand want another plan than rows in between, now and in the batch
    behind them."""
    longer, shorter = Plan("tidar", 16, 15), Plan("tidar", 4, 3)
    times = Measured(
        {SINGLE: 1.0, shapes(longer)[0]: 2.5, shapes(shorter)[0]: 1.35, **{Shape(1, 1, k): 1 for k in (4, 16)}}
    )
    found = []
    for accepted in ([16, 16, 16, 1, 1, 1], [8] * 6):
        told = Acceptance()
        for _ in range(2):
            policy = Planning(16, [AR, longer, shorter], told)
            policy.open(6)
            policy.begin(lambda _: times)
            first = policy.plan
            for _ in range(2 * REPLAN):
                policy.learn(shapes(longer)[0], Outcome(accepted, [0] * 6, [0] * 6, [-1] * 6, [0] * 6))
        found.append((policy.plan, first))
        spread = told.spread
        assert len(spread) == 4 and spread[0] == spread[1] <= spread[2] == spread[3]
        assert (spread[0] < spread[3]) == (accepted[0] != accepted[-1])
        policy.select([0])
        policy.begin(lambda _: times)
        for _ in range(REPLAN):
            policy.learn(shapes(longer)[0], Outcome(accepted[:1], [0], [0], [-1], [0]))
        assert policy.plan == longer, "the row that is left is a fast one"
        assert (told.spread == spread).all(), "but says nothing of the next batch"
    assert found == [(shorter, shorter), (longer, longer)]


def test_measured_times_are_usable(qwen3: Model) -> None:
    points = measure(qwen3.core, 2)
    assert [q for q, _ in points] == [1, 8, 48]
    assert all(s > 0 for _, s in points)


def test_what_does_not_go_together_is_refused(qwen3: Model) -> None:
    for wrong in ({"proposals": 1}, {"beta": 0.5}, {"acceptance": "ratio"}):
        with pytest.raises(TidarError, match="method 'auto'"):
            qwen3.generate(PROMPTS, method="auto", **wrong)
    with pytest.raises(TidarError, match="method 'linear' takes no proposals"):
        qwen3.generate(PROMPTS, method="linear", proposals=1)
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
