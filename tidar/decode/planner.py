"""Which method, draft length and proposals make the most tokens a second here and now.

A plan says what steps feed (`tidar.decode.policy`). What it yields is arithmetic: from how often a draft at each offset
of its block is accepted, a small Markov chain gives the tokens a step commits; from the time that steps take, tokens a
second follow. Both are learned while decoding, the times from a prior measured once. By the contract no choice
changes a token.

An *offset* is a draft's place in the block of masks that made it: a block's token 0 is the autoregressive one, and its
drafts are 1 … M-1. Behind a pruned proposal only the tail of a lower one is left, which starts at a higher offset.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tidar.layout import all_proposals

__all__ = ["AR", "Acceptance", "Clock", "Measured", "Plan", "Times", "best", "candidates", "few", "tokens_per_step"]

FORGET = 0.98
"""What an observation still weighs one step later: some fifty steps count."""
DOUBT = 1.15
"""What has not been timed is believed to be slower by this: trying a plan costs steps too."""
RECENT = 9
"""Steps whose time is remembered."""
PRIOR = 0.7, 2.0
"""Acceptance believed before anything is seen, and the number of observations that belief is worth."""


@dataclass(frozen=True)
class Plan:
    """A policy.

    Attributes:
        method: ``ar``, ``linear`` or ``tidar``.
        draft_len: K, tokens verified together; also the masks of a proposal.
        proposals: of ``tidar``.
    """

    method: str
    draft_len: int = 1
    proposals: tuple[int, ...] = ()

    @property
    def queries(self) -> tuple[int, ...]:
        """Queries of the steps it goes round in."""
        if self.method == "linear":
            return self.draft_len, 1 + self.draft_len
        return (self.draft_len * (1 + len(self.proposals)),)


AR = Plan("ar")


def candidates(longest: int) -> Iterator[Plan]:
    """Plans worth comparing, for draft lengths up to ``longest``."""
    yield AR
    for k in sorted({k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= longest} | ({longest} - {1})):
        yield Plan("linear", k)
        some = {all_proposals(k), (1,), (1, 2), (1, 2, 3), (1, 2, 4, 8, 16), (1, 2, 3, 4, 6, 8, 12, 16)}
        for proposals in sorted({tuple(j for j in chosen if j <= k) for chosen in some}):
            yield Plan("tidar", k, proposals)


def few(longest: int) -> Iterator[Plan]:
    """The plans among which most is decided, where each costs seconds to make ready (`tidar.fast`).

    All proposals but the last make k · k queries, which fill tiles; the last one pays only where all drafts stand, and
    costs a tile more.
    """
    yield AR
    for k in sorted({longest, longest // 2, longest // 4} - {0, 1}, reverse=True):
        some = {k - 1, k // 2, k // 4} if k == longest else {k - 1, min(3, k - 1)}
        for count in sorted(some - {0}, reverse=True):
            yield Plan("tidar", k, all_proposals(count))
        if k > longest // 4:
            yield Plan("linear", k)


class Acceptance:
    """How often the draft at each offset was accepted, given that those before it were; the past fades."""

    def __init__(self) -> None:
        self._hits: NDArray[np.float64] = np.zeros(0)
        self._seen: NDArray[np.float64] = np.zeros(0)

    def update(self, tested: Sequence[tuple[int, int, int]]) -> None:
        """Take what one step found.

        Args:
            tested: for each row the offset of its first draft, how many drafts it had, and how many were accepted.
        """
        self._hits *= FORGET
        self._seen *= FORGET
        for first, count, accepted in tested:
            last = first + min(accepted + 1, count)  # one past the last that was compared
            if last > len(self._seen):
                room = last - len(self._seen)
                self._hits, self._seen = np.pad(self._hits, (0, room)), np.pad(self._seen, (0, room))
            self._seen[first:last] += 1
            self._hits[first : first + accepted] += 1

    def rates(self, longest: int) -> NDArray[np.float64]:
        """(longest,) probabilities; entry 0, the certain token, is 1. An offset hardly seen takes after those seen."""
        hits, seen = np.zeros(longest), np.zeros(longest)
        known = min(longest, len(self._seen))
        hits[:known], seen[:known] = self._hits[:known], self._seen[:known]
        value, weight = PRIOR
        general = (hits[1:].sum() + value * weight) / (seen[1:].sum() + weight)
        rates: NDArray[np.float64] = (hits + general * weight) / (seen + weight)
        rates[0] = 1
        return rates


def tokens_per_step(plan: Plan, rates: NDArray[np.float64]) -> float:
    """Tokens a step of ``plan`` commits on average, in the long run.

    Args:
        plan: the policy.
        rates: (at least ``plan.draft_len``,) acceptance by offset, as of `Acceptance.rates`.
    """
    k = plan.draft_len
    if plan.method == "ar" or k == 1:
        return 1.0
    survive = np.cumprod(rates[:k])
    if plan.method == "linear":
        return (float(survive.sum()) + 1) / 2  # the drafting step makes one token certain too
    # State: offsets that the drafts lie behind, 0 … k-1; at k-1 there are no drafts. Row b, column n of `chain`: the
    # chance that more than n drafts stand.
    ahead = np.add.outer(np.arange(k), np.arange(1, k + 1))
    chain = np.cumprod(np.where(ahead < k, rates[np.minimum(ahead, k - 1)], 0.0), axis=1)
    chain = np.concatenate([np.ones((k, 1)), chain], axis=1)
    moves = (chain[:, :-1] - chain[:, 1:]) @ _moves(plan)
    share = np.linalg.matrix_power((moves + np.eye(k)) / 2, 256)[0]  # from the prefill's; lazy, so no cycles
    return float(share @ chain.sum(1))


@cache
def _moves(plan: Plan) -> NDArray[np.float64]:
    """(k, k): where the drafts lie behind next (column) if exactly n = 1 … k stand (row)."""
    k = plan.draft_len
    made = np.zeros((k, k))
    for n in range(1, k + 1):
        level = max((j for j in plan.proposals if j <= n), default=None)
        made[n - 1, k - 1 if level is None else min(n - level, k - 1)] = 1
    return made


class Clock(Protocol):
    """Seconds a step takes by its queries."""

    def __call__(self, queries: int) -> float:
        """As far as it is known."""
        ...

    def update(self, queries: int, seconds: float) -> None:
        """Take the time of one step."""
        ...

    def sure_of(self, queries: int) -> bool:
        """It was measured, and not only supposed."""
        ...

    def ready(self, shape: Hashable) -> bool:
        """A step of this `tidar.decode.policy.Shape` can be taken at once."""
        ...


class Measured:
    """A `Clock` of times that were measured with care beforehand, and are not learned from.

    Args:
        seconds: of a step, by its queries.
        shapes: of steps that are ready; others would have to be compiled first.
    """

    def __init__(self, seconds: Mapping[int, float], shapes: Iterable[Hashable]) -> None:
        self._seconds, self._shapes = dict(seconds), frozenset(shapes)

    def ready(self, shape: Hashable) -> bool:
        return shape in self._shapes

    def __call__(self, queries: int) -> float:
        # What was not measured is the nearest larger step, or hopeless.
        return min((s for q, s in self._seconds.items() if q >= queries), default=float("inf"))

    def update(self, queries: int, seconds: float) -> None:
        pass

    def sure_of(self, queries: int) -> bool:
        return queries in self._seconds


class Times:
    """Seconds a step takes by its queries: the median of what was seen, else a line between measured points, stretched
    as steps that were seen took longer than it says (sampling, say, is not measured), and a doubt on top.

    Args:
        measured: queries and seconds, at least two points; from `measure` or a table.
    """

    def __init__(self, measured: Sequence[tuple[int, float]]) -> None:
        points = sorted(measured)
        self._queries = np.array([q for q, _ in points], dtype=np.float64)
        # More queries never take less time: what says otherwise is noise.
        self._seconds = np.maximum.accumulate(np.array([s for _, s in points]))
        self._seen: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._stretch: deque[float] = deque([1.0], maxlen=4 * RECENT)

    def update(self, queries: int, seconds: float) -> None:
        """Take the time of one step."""
        self._seen[queries].append(seconds)
        self._stretch.append(seconds / self._line(queries))

    def __call__(self, queries: int) -> float:
        # The median, and not of one or two: a stall is not what the next step will take.
        return (
            median(self._seen[queries])
            if self.sure_of(queries)
            else DOUBT * self._line(queries) * median(self._stretch)
        )

    def ready(self, shape: Hashable) -> bool:
        return True

    def sure_of(self, queries: int) -> bool:
        """Steps of so many queries have been seen often enough."""
        return len(self._seen[queries]) >= 3

    def _line(self, queries: int) -> float:
        q, s = self._queries, self._seconds
        if queries <= q[-1]:
            return float(np.interp(queries, q, s))
        slope = (s[-1] - s[-2]) / (q[-1] - q[-2])
        return float(s[-1] + slope * (queries - q[-1]))


def best(plans: Sequence[Plan], rates: NDArray[np.float64], seconds: Callable[[int], float], keep: Plan) -> Plan:
    """The plan with the most tokens a second; ``keep`` unless another is better by a twentieth."""

    @cache
    def rate(plan: Plan) -> float:
        return tokens_per_step(plan, rates) * len(plan.queries) / sum(seconds(q) for q in plan.queries)

    found = max(plans, key=rate)
    return found if rate(found) > 1.05 * rate(keep) else keep
