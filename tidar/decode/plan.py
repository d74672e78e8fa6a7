"""What steps may feed: shapes of single steps, and plans of steps that go round.

A plan is a method with its sizes; it says nothing of what it is worth (`tidar.decode.planner`) or of when it is
followed (`tidar.decode.policy`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tidar.layout import all_proposals

__all__ = ["AR", "SINGLE", "Plan", "Shape", "candidates", "few", "shapes"]


class Shape(NamedTuple):
    """What a step feeds (`tidar.layout.step`)."""

    drafts: int
    """K, the certain token among them."""
    proposals: tuple[int, ...]
    masks: int
    """M, of each proposal."""

    @property
    def queries(self) -> int:
        """L."""
        return self.drafts + len(self.proposals) * self.masks

    @property
    def kept(self) -> list[int]:
        """For n = 0 … K accepted drafts the index of the largest proposal up to n, or -1."""
        return [max((i for i, j in enumerate(self.proposals) if j <= n), default=-1) for n in range(self.drafts + 1)]


SINGLE = Shape(1, (), 1)
"""An autoregressive step."""


@dataclass(frozen=True)
class Plan:
    """What steps feed while it is followed.

    Attributes:
        method: ``ar``, ``linear`` or ``tidar``.
        draft_len: K, tokens verified together; also the masks of a proposal.
        proposals: of ``tidar``.
    """

    method: str
    draft_len: int = 1
    proposals: tuple[int, ...] = ()


AR = Plan("ar")


def shapes(plan: Plan) -> list[Shape]:
    """Of the steps that a plan goes round in."""
    k = plan.draft_len
    if plan.method == "ar" or k == 1:
        return [SINGLE]
    if plan.method == "linear":
        return [Shape(k, (), k), Shape(1, (1,), k)]
    return [Shape(k, plan.proposals, k)]


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
    costs a tile more. The first one alone makes 2 · k queries, the fewest that still draft in every step: what its
    block says of later places serves wherever the drafts end.
    """
    yield AR
    for k in sorted({longest, longest // 2, longest // 4} - {0, 1}, reverse=True):
        some = {k - 1, k // 2, k // 4, 1} if k == longest else {k - 1, min(3, k - 1), 1}
        if k == longest // 4:
            some -= {1}
        for count in sorted(some - {0}, reverse=True):
            yield Plan("tidar", k, all_proposals(count))
        if k > longest // 4:
            yield Plan("linear", k)
