"""Which shape the next step has: fixed methods as policies, and the one that plans (`tidar.decode.planner`).

A policy sees how many drafts are at hand and how many were accepted; it never sees a token, and changes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tidar.decode.clock import Clock
from tidar.decode.plan import AR, SINGLE, Outcome, Plan, Shape, candidates
from tidar.decode.planner import EASES, FRESH, OWN, TAILS, UNLIKELY, Acceptance, Plans, Rates, best, likeliest, speeds

__all__ = ["TOGETHER", "Alternating", "Autoregressive", "Fixed", "Planning", "Policy"]

TOGETHER = 8
"""Steps that the fast path learns from together."""
REPLAN = 64
"""Steps that a look at all plans is spread over, but for those that others are learnt in: at once it would take the
host longer than a small model's step takes the GPU, and the GPU would wait."""
ABREAST = 10
"""Plans that are looked at together: arrays of a few plans take hardly longer than of one."""
PROBE = 64
"""Autoregressive steps after which a round of drafts asks whether they have become better."""


class Policy(Protocol):
    """Asked for a shape before each step, told the outcome after it, in order; several steps may lie between."""

    def open(self, rows: int) -> int:
        """New rows; returns the masks of their prefill."""
        ...

    def begin(self, times: Callable[[Sequence[Plan]], Clock]) -> None:
        """Decoding begins, or goes on with fewer rows; ``times`` tells what steps of plans take here, measuring them if
        it must."""
        ...

    def shape(self, held: int) -> Shape:
        """Of the next step, when ``held`` drafts are at hand, the certain token among them."""
        ...

    def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
        """Take what a step came to, and its time if it is known."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        ...

    def close(self) -> None:
        """Learn from what has not been learnt from yet: no step will follow."""
        ...


class Fixed:
    """TiDAR's one forward: always the same draft length, proposals and alternates.

    Args:
        draft_len: K, and the masks of a proposal.
        proposals: P; none with a draft length of 1.
        alternates: A.
    """

    def __init__(self, draft_len: int, proposals: int, alternates: int = 0) -> None:
        self._draft_len, self._proposals, self._alternates = draft_len, proposals, alternates

    def open(self, rows: int) -> int:
        return self._draft_len

    def begin(self, times: Callable[[Sequence[Plan]], Clock]) -> None:
        pass

    def shape(self, held: int) -> Shape:
        return Shape(held, min(held, self._proposals), self._draft_len, self._alternates if held > 1 else 0)

    def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
        pass

    def select(self, rows: Sequence[int]) -> None:
        pass

    def close(self) -> None:
        pass


class Autoregressive(Fixed):
    """One token a forward."""

    def __init__(self) -> None:
        super().__init__(1, 0)

    def open(self, rows: int) -> int:
        return 0


class Alternating(Fixed):
    """Two forwards in turn: one drafts after the last certain token, one verifies."""

    def __init__(self, draft_len: int) -> None:
        super().__init__(draft_len, 0)

    def shape(self, held: int) -> Shape:
        if held > 1 or self._draft_len == 1:
            return Shape(held, 0, self._draft_len)
        return Shape(1, 1, self._draft_len)


class Planning:
    """Chooses method, draft length, proposals and alternates by what steps take and what they accepted.

    Args:
        draft_len: the longest draft.
        plans: what to choose from; `candidates` by default.
        acceptance: what was seen before, by decoders of the same model; it is added to.
        every: steps after which they are learnt from, together; more of them where steps take as long as learning.

    Attributes:
        plan: the one that steps follow now.
        acceptance: what was seen.
        times: of steps.
    """

    times: Clock

    def __init__(
        self,
        draft_len: int,
        plans: Sequence[Plan] | None = None,
        acceptance: Acceptance | None = None,
        *,
        every: int = 1,
    ) -> None:
        self.plan = AR
        self.acceptance = Acceptance() if acceptance is None else acceptance
        self._draft_len = draft_len
        self._plans = list(candidates(draft_len) if plans is None else plans)
        self._idle = 0
        self._new = True
        self._came: list[tuple[Shape, Outcome]] = []
        self._every = every
        self._looking = self._looks(1)
        self._block = draft_len  # masks in the blocks that made the drafts
        self._behind = np.zeros(0, dtype=np.int64)  # offset of the certain token in its row's block
        self._unlikely = np.zeros(0, dtype=np.bool_)  # whether what came of the last drafts was
        self._sure = np.zeros(0, dtype=np.int64)  # drafts that alternates told
        self._own = np.zeros((2, 0))  # of each row, how many drafts were compared and how many stood; the past fades
        self._whole = False  # a batch of which no row has left

    def open(self, rows: int) -> int:
        self._came.clear()
        self._new = True
        self._block, self._behind = self._draft_len, np.zeros(rows, np.int64)
        self._unlikely, self._sure = np.zeros(rows, np.bool_), np.zeros(rows, np.int64)
        self._own, self._whole = np.zeros((2, rows)), rows > 1
        return self._draft_len

    def begin(self, times: Callable[[Sequence[Plan]], Clock]) -> None:
        self.times = times(self._plans)
        if self._new:
            next(self._looks(1))
            self._new = False
        self._looking = self._looks(self._often())  # after a change of rows while the GPU works on

    def shape(self, held: int) -> Shape:
        wanted = self._wanted(held)
        # After a change of plan the drafts at hand may be too few for what is ready: then they are dropped, and others
        # are made meanwhile.
        return next(s for s in (wanted, Shape(1, 1, self.plan.draft_len), SINGLE) if self.times.ready(s))

    def _wanted(self, held: int) -> Shape:
        plan = self.plan
        if not self.times.sure_of(SINGLE):  # what everything is compared with
            return SINGLE
        if plan.method == "ar":
            if held > 1:  # of the plan before, or to see whether drafts have become better
                return Shape(held, 0, held)
            probing = self._idle >= PROBE and self._draft_len > 1
            return Shape(1, 1, self._draft_len) if probing else SINGLE
        k = min(plan.draft_len, held)
        if k == 1:  # nothing is drafted
            return Shape(1, 1, plan.draft_len)
        return Shape(k, min(k, plan.proposals), plan.draft_len, plan.alternates)

    def learn(self, shape: Shape, outcome: Outcome, seconds: float | None = None) -> None:
        if seconds is not None:
            self.times.update(shape, seconds)
        self._idle = 0 if shape.proposals else self._idle + (self.plan.method == "ar")
        self._came.append((shape, outcome))
        taking = len(self._came) == self._every
        if taking:
            self._take()
        if not taking or self._every == 1:
            next(self._looking)

    def select(self, rows: Sequence[int]) -> None:
        self._take()
        rows = list(rows)
        self._behind, self._unlikely, self._sure = self._behind[rows], self._unlikely[rows], self._sure[rows]
        self._own, self._whole = self._own[:, rows], False

    def close(self) -> None:
        self._take()

    def _take(self) -> None:
        """Learn from the steps that came; S of them, B rows."""
        if not self._came:
            return
        shapes = [shape for shape, _ in self._came]
        n, behind, places, met, known = np.array([outcome for _, outcome in self._came]).swapaxes(0, 1)
        steps = len(shapes)
        self._came.clear()
        drafts = np.array([shape.drafts for shape in shapes])[:, None]
        # What the drafts of each step were is told by the outcome before it.
        begun = np.concatenate([self._behind[None], behind[:-1]])
        sure = np.concatenate([self._sure[None], known[:-1]])
        held = np.array([self._block, *(shape.masks for shape in shapes[:-1])])[:, None]
        count = np.minimum(drafts, held - begun) - 1
        tested = count > 0
        surprise = tested & (places >= likeliest(1 + count))
        unlikely = np.empty_like(tested)
        for step, shape in enumerate(shapes):
            unlikely[step] = self._unlikely
            if shape.drafts > 1:  # where there were no drafts it was known what would come
                self._unlikely = surprise[step]
        if tested.any():
            kinds = np.where(begun > 0, TAILS, np.where(unlikely, UNLIKELY, FRESH))
            stood = np.minimum(n - 1, count)
            told = np.array([np.minimum(stood + 1, count), stood])
            told -= np.minimum(told, sure)  # what was certain says nothing of the row
            self._own = OWN**steps * self._own + np.where(tested, told, 0).sum(1)
            if self._whole:
                self.acceptance.spread = self._eases()
            self.acceptance.update(kinds[tested], count[tested], stood[tested], sure[tested], steps)
            # What is left of a tail says little of whole blocks: too few outcomes to tell shares of them apart.
            whole = tested & (begun == 0)
            self.acceptance.placed(1 + count[whole], places[whole], steps)
        for each in {shape.alternates for shape in shapes} - {0}:
            asked = tested & np.array([shape.alternates == each for shape in shapes])[:, None]
            if asked.any():
                self.acceptance.tried(each, met[asked], known[asked], steps)
        self._block, self._behind, self._sure = shapes[-1].masks, behind[-1], known[-1]

    def _often(self) -> int:
        """Steps that a look is spread over: fewer where they take longer."""
        return max(REPLAN // 4, REPLAN // max(1, len(self._behind)))

    def _eases(self) -> Rates:
        """Powers (at most `EASES`,) of the rows (`Acceptance.eases`), or of those of the batch before."""
        powers = self.acceptance.eases(*self._own)
        if len(powers) > 1 and not self._own.any():
            return self.acceptance.spread
        if len(powers) <= EASES:
            return powers
        powers.sort()
        return powers[np.arange(1, 2 * EASES, 2) * len(powers) // (2 * EASES)]

    def _looks(self, steps: int) -> Iterator[None]:
        """Look at all plans, some in each of so many steps, then follow the quickest; and begin again."""
        groups = _groups(self._plans)
        while True:
            rates = self.acceptance.rates(self._draft_len) ** self._eases()[:, None, None]
            found: dict[Plan, float] = {}
            for step in range(steps):
                for plans in groups[step * len(groups) // steps : (step + 1) * len(groups) // steps]:
                    found |= speeds(plans, rates, self.acceptance.cover(plans), self.times)
                if step == steps - 1:
                    self.plan = best(found, self.plan)
                yield


def _groups(plans: Sequence[Plan]) -> list[Plans]:
    """Plans of one draft length, which are looked at together."""
    lengths = dict.fromkeys(plan.draft_len for plan in plans)
    alike = [tuple(plan for plan in plans if plan.draft_len == k) for k in lengths]
    return [each[first : first + ABREAST] for each in alike for first in range(0, len(each), ABREAST)]
