"""Which plan (`tidar.decode.plan`) makes the most tokens a second here and now.

What a plan yields is arithmetic: from how often drafts are accepted a small Markov chain gives the tokens a step
commits; from the time that steps take, tokens a second follow. Both are learned while decoding, the times from a prior
measured once. By the contract no choice changes a token.

An outcome that was not drafted for leaves the *tail* of a lower proposal's block, whose masks saw fewer drafts, or no
drafts at all; other drafts are *fresh*. A tail begins behind a draft that was wrong, so it stands less often, wherever
in its block it begins. And behind an outcome that was *unlikely* drafts stand less often than behind a likely one,
which plans meet unequally: few proposals are for likely outcomes alone. So what is learned is how often the first,
second, … draft behind the certain token stood, of three kinds of drafts: fresh ones behind an unlikely outcome, other
fresh ones, and tails; how often the outcome that came was among the likeliest; and how often the token behind it
was one of its alternates, which makes the next first draft sure.

Rows of a batch are not alike: one repeats itself, and whatever is drafted stands, while another one hardly profits. So
of each row it is learned how *easy* it is: its drafts stand as often as all rows' do, to the power of a number of its
own. A plan is judged by what a token takes in rows of several ease, not by all tokens: fast rows end soon, and slow
ones are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tidar.decode.plan import Plan, Shape, shapes
from tidar.proposals import MOST_ALTERNATES

__all__ = [
    "TAIL", "Acceptance", "Cover", "Plans", "Rates", "best", "likeliest", "speeds", "tokens_per_step",
]  # fmt: skip

FORGET, STALE = 0.98, 0.995
"""What an observation still weighs one step later: some fifty steps count. And of a kind of drafts that the step did
not have: in some hundreds of steps a judgement is forgotten, and asked for again."""
PRIOR = 0.7, 2.0
"""Acceptance believed before anything is seen, and the number of observations that belief is worth."""
TAIL, MOST = 0.9, 0.97
"""What a draft of a tail is believed to be worth of a fresh one, before either is seen; and of any, at most."""
COVER = 7.0
"""Believed before anything is seen: an outcome is not among a share x of all, the likeliest, as often as (1 - x) to
this power. So the first of eight covers 61 %, and the first of sixteen 36 %."""
GRID = np.linspace(0, 1, 65)
"""Shares of all outcomes at which it is counted how often they covered."""
LIKELY = 0.2
"""The share of all outcomes, the likeliest, that are no surprise: they cover some three quarters."""
BELOW = 2 / 3
"""How often an outcome that was not drafted for lies below all that were; 1 is as often as if these stood anywhere."""
OTHERWISE, FEWER, SECOND = 0.19, 1.2, 0.5
"""How often the first alternate is believed to be the token behind the drafts, before any is seen; the power by which
the n-th is less often; and how often the second of a pair is the token behind that."""
KINDS = 3
UNLIKELY, FRESH, TAILS = range(KINDS)
"""Kinds of drafts: fresh ones behind an unlikely outcome, other fresh ones, and tails."""
EASES = 4
"""Rows of so many kinds stand for all of a batch."""
OWN, FIRM = 0.97, 8.0
"""What a row's observation still weighs one step later, and how many of them count as much as the belief that it is
like all others."""
SEEMLY, EASY = (1e-3, 1 - 1e-3), (0.1, 5.0)
"""Between what rates are compared, and what powers come of it."""
MARGIN = 1.03
"""How much quicker another plan must look: looks are noisy, and changing costs a step."""

Plans = tuple[Plan, ...]
Rates = NDArray[np.float64]
Counts = NDArray[np.int64]


class Acceptance:
    """How often the first, second, … draft was accepted, given that those before it were; the past fades.

    Attributes:
        spread: (at most `EASES`,) powers of the rows of the last batch, ascending, for a new one to begin with.
    """

    def __init__(self) -> None:
        # Of each kind how often each draft was compared, and below, how often it stood; none is at place 0.
        self._told: Rates = np.zeros((2 * KINDS, 1))
        # How often an outcome was among the likeliest, at each share of them, and how many there were.
        self._covered: Rates = PRIOR[1] * (1 - (1 - GRID) ** COVER)
        self._placed = PRIOR[1]
        # How often each alternate was the token, and how often there was one.
        self._met: Rates = PRIOR[1] * OTHERWISE * np.power(1.0 + np.arange(MOST_ALTERNATES), -FEWER)
        self._asked: Rates = np.full(MOST_ALTERNATES, PRIOR[1])
        # How often the second of a pair followed, and how often there was one behind an alternate that came.
        self._second, self._first = PRIOR[1] * SECOND, PRIOR[1]
        self.spread: Rates = np.ones(EASES)

    def update(
        self, kinds: Counts, counts: Counts, accepted: Counts, sure: Counts | None = None, steps: int = 1
    ) -> None:
        """Take what a step found, in R rows that had drafts. Whole arrays at a time: the GPU waits for nobody.

        Args:
            kinds: (R,), `UNLIKELY`, `FRESH` or `TAILS`.
            counts: (R,), how many there were, at least 1.
            accepted: (R,), how many of them were accepted.
            sure: (R,), how many of the first were certain to be, 0 to 2, which says nothing of others; none by default.
            steps: as one of which the rows' steps count.
        """
        ends = np.concatenate([np.minimum(accepted + 1, counts), accepted]) + 1  # one past the last: compared, stood
        most = int(ends.max())
        if (room := most - self._told.shape[1]) > 0:
            self._told = np.pad(self._told, ((0, 0), (0, room)))
        # How many ends lie behind each place: all, without those up to it.
        both, width = np.concatenate([kinds, kinds + KINDS]), most + 1
        ended = np.bincount(both * width + ends, minlength=2 * KINDS * width).reshape(2 * KINDS, width)
        behind = ended[:, ::-1].cumsum(1)[:, ::-1]
        met = behind[:KINDS, 0] > 0
        self._told *= np.where(np.concatenate([met, met]), FORGET**steps, STALE**steps)[:, None]
        self._told[:, 1:most] += behind[:, 2:]
        for place in (1, 2) if sure is not None and sure.any() else ():
            # Of those that were compared: a sure one falls where what it was compared with is filtered.
            known = (sure >= place) & (np.minimum(accepted + 1, counts) >= place)  # type: ignore[operator]
            self._told[:KINDS, place : place + 1] -= np.bincount(kinds[known], minlength=KINDS)[:, None]
            stood = np.bincount(kinds[known], accepted[known] >= place, minlength=KINDS)[:, None]
            self._told[KINDS:, place : place + 1] -= stood

    def placed(self, outcomes: Counts, places: Counts, steps: int = 1) -> None:
        """Take the places (R,), from 0, that what came had among so many ``outcomes`` (R,), the likeliest first.

        They are spread over shares of all outcomes, so that what was seen with one draft length serves the others.
        """
        covered = (GRID * outcomes[:, None] - places[:, None]).clip(0, 1).sum(0)
        self._covered = FORGET**steps * self._covered + covered
        self._placed = FORGET**steps * self._placed + len(places)

    def tried(self, alternates: int, met: Counts, told: Counts, steps: int = 1) -> None:
        """Take which of so many alternates (R,) outcomes were continued by, from 0; -1 where by none, as where all
        drafts stood, which has none. And how many drafts that told (R,)."""
        hit = np.bincount(met[met >= 0], minlength=alternates)
        self._met[:alternates] = FORGET**steps * self._met[:alternates] + hit
        self._asked[:alternates] = FORGET**steps * self._asked[:alternates] + len(met)
        paired = (met >= 0) & (met < alternates // 2)
        self._second = FORGET**steps * self._second + int((told[paired] > 1).sum())
        self._first = FORGET**steps * self._first + int(paired.sum())

    def eases(self, compared: Rates, stood: Rates) -> Rates:
        """(R,) powers of rows of whose drafts, sure ones apart, so many were ``compared`` and ``stood``, both (R,)."""
        asked, hits = self._told[:KINDS, 1:].sum(), self._told[KINDS:, 1:].sum()
        mean = np.clip((hits + PRIOR[0] * PRIOR[1]) / (asked + PRIOR[1]), *SEEMLY)
        own = np.clip((stood + FIRM * mean) / (compared + FIRM), *SEEMLY)
        powers: Rates = np.clip(np.log(own) / np.log(mean), *EASY)
        return powers

    def sure(self, alternates: int) -> tuple[float, float]:
        """How often with so many alternates the first draft behind an outcome is sure, and how often the second too."""
        each = np.minimum((self._met / self._asked)[:alternates], 1)
        first, paired = (min(MOST, float(some.sum())) for some in (each, each[: alternates // 2]))
        return first, paired * self._second / self._first

    def cover(self, plans: Plans) -> Cover:
        """How often outcomes are what plans of one draft length are prepared for, in states of `tokens_per_step`."""
        drafted, likely = np.interp(_asked(plans), GRID, self._covered) / self._placed
        sure = np.array([self.sure(plan.alternates) for plan in plans])
        return Cover(np.minimum(likely, drafted), drafted, *sure.T)

    def rates(self, longest: int) -> Rates:
        """(3, longest) probabilities, of fresh drafts behind unlikely outcomes, of others, and of tails; entry 0, the
        certain token, is 1.

        A place hardly seen takes after those seen of its kind, and a kind hardly seen after the others.
        """
        told = np.zeros((2 * KINDS, longest))
        known = min(longest, self._told.shape[1])
        told[:, :known] = self._told[:, :known]
        seen, hits = told[:KINDS], told[KINDS:]
        value, weight = PRIOR
        stood, asked = hits[:, 1:].sum(1), seen[:, 1:].sum(1)
        fresh = (stood[1] + value * weight) / (asked[1] + weight)
        # Tails begin behind outcomes that were not drafted for, unlikely ones.
        both = asked[0] + asked[2]
        unlikely = min(MOST, float(stood[0] + stood[2] / TAIL) / both) if both > weight else TAIL * fresh
        unlikely = (stood[0] + unlikely * weight) / (asked[0] + weight)
        tail = (stood[2] + TAIL * unlikely * weight) / (asked[2] + weight)
        general = np.array([unlikely, fresh, tail])[:, None]
        rates: Rates = (hits + general * weight) / (seen + weight)
        rates[:, 0] = 1
        return rates


def likeliest(outcomes: Counts) -> Counts:
    """How many of so many outcomes are no surprise."""
    count: Counts = np.ceil(LIKELY * outcomes).astype(np.int64)
    return count


@cache
def _asked(plans: Plans) -> Rates:
    """(2, P, k + 1), of each state of `tokens_per_step` the shares of all outcomes, as many as there are drafts with
    the certain token, that are drafted for; and that are no surprise."""
    k = plans[0].draft_len
    outcomes = k - np.append(np.arange(k), 0)
    wanted = [np.minimum(_proposals(plan), outcomes) for plan in plans]
    asked: Rates = np.array([wanted, [likeliest(outcomes)] * len(plans)]) / outcomes
    return asked


def _proposals(plan: Plan) -> int:
    return plan.proposals if plan.method == "tidar" else plan.draft_len


class Cover(NamedTuple):
    """How often outcomes are what P steps were prepared for; once for all steps and their states, or of each."""

    likely: Rates | float
    """(P, states), drafted for, and no surprise."""
    drafted: Rates | float
    """(P, states), drafted for."""
    sure: Rates | float = 0.0
    """(P,), continued by an alternate, of all."""
    second: Rates | float = 0.0
    """(P,), and by the second of its pair."""


def tokens_per_step(plans: Plans, rates: Rates, cover: Cover) -> Rates:
    """Tokens (..., P) that a step of each of P ``plans`` commits on average, in the long run.

    Args:
        plans: of one draft length.
        rates: (..., 3, at least the draft length) acceptance, as of `Acceptance.rates`.
        cover: as of `Acceptance.cover`.
    """
    k = plans[0].draft_len
    if k == 1:
        return np.ones((*rates.shape[:-2], len(plans)))
    sure, more = (np.reshape(each, (-1, 1, 1)) for each in (cover.sure, cover.second))
    rates = np.repeat(rates[..., None, :, :k], len(plans), -3)
    first, second = rates[..., 1:2].copy(), rates[..., 2:3]
    rates[..., 1:2] += sure * (1 - first)
    # Both are sure, the first alone is, or none: the second's chance once the first stands.
    both = more + (sure - more + (1 - sure) * first) * second
    rates[..., 2:3] = np.divide(both, rates[..., 1:2], out=second.copy(), where=rates[..., 1:2] > 0)
    survive = np.cumprod(rates, axis=-1)
    # State: how far into their block the drafts begin, 0 … k-1, at k-1 there are none; 0 behind an unlikely outcome,
    # and k for other fresh ones. Row b, column n of `chain`: the chance that more than n drafts stand.
    kinds, there = _states(k)
    chain = np.zeros((*rates.shape[:-2], k + 1, k + 1))
    chain[..., :k] = survive[..., kinds, :] * there
    # What an outcome leads to: fresh drafts, whatever it is, or what it leaves where it was not drafted for.
    drafted = np.zeros((len(plans), k + 1)) + cover.drafted
    moves = (1 - drafted)[..., None] * ((chain[..., :-1] - chain[..., 1:]) @ _missed(plans))
    moves[..., k] += cover.likely
    moves[..., 0] += drafted - cover.likely
    share = (moves + np.eye(k + 1)) / 2  # lazy, so no cycles
    for _ in range(8):
        share = share @ share
    made: Rates = (share[..., k, :] * chain.sum(-1)).sum(-1)  # from the prefill's
    # The drafting step of two forwards makes one token certain too.
    return np.where([plan.method == "linear" for plan in plans], (made + 1) / 2, made)


@cache
def _states(k: int) -> tuple[Counts, NDArray[np.bool_]]:
    """Of each state the kind of its drafts, (k + 1,), and which there are, (k + 1, k)."""
    kinds, begins = np.full(k + 1, 2), np.append(np.arange(k), 0)
    kinds[0], kinds[k] = 0, 1
    return kinds, np.add.outer(begins, np.arange(k)) < k


def speeds(plans: Plans, rates: Rates, cover: Cover, seconds: Callable[[Shape], float]) -> dict[Plan, float]:
    """Tokens a second of ``plans``, by what one takes on average over the rows of all ``rates`` (..., 3, K), where
    steps take so many ``seconds``; the rest as of `tokens_per_step`."""
    tokens = tokens_per_step(plans, rates, cover)
    taken = (1 / tokens).reshape(-1, len(plans)).mean(0).tolist()  # steps a token
    long = [sum(map(seconds, shapes(plan))) / len(shapes(plan)) for plan in plans]
    return {plan: 1 / (step * each) for plan, step, each in zip(plans, long, taken, strict=True)}


def best(speeds: Mapping[Plan, float], keep: Plan) -> Plan:
    """The quickest plan; ``keep`` unless another is quicker by `MARGIN`."""
    found = max(speeds, key=lambda plan: speeds[plan])
    return found if speeds[found] > MARGIN * speeds.get(keep, 0) else keep


@cache
def _missed(plans: Plans) -> Rates:
    """(P, k, k + 1): the next drafts' state (column) if exactly n = 1 … k stand (row) and that was not drafted for."""
    return np.stack([_missed_of(plan.draft_len, _proposals(plan)) for plan in plans])


def _missed_of(k: int, proposals: int) -> Rates:
    """(k, k + 1), of one plan.

    Proposals cut 1 … k into as many parts and one; below the lowest there are no drafts.
    """
    missed = np.zeros((k, k + 1))
    apart = max(1, round((k - proposals) / (proposals + 1)))
    none = BELOW / (proposals + 1)
    for n in range(1, k + 1):
        tails = min(apart, n - 1)
        missed[n - 1, k - 1] = none if tails else 1
        for behind in range(1, tails + 1):
            missed[n - 1, min(behind, k - 1)] += (1 - none) / tails
    return missed
