"""What steps may feed: shapes of single steps, and plans of steps that go round.

A plan is a method with its sizes; it says nothing of what it is worth (`tidar.decode.planner`) or of when it is
followed (`tidar.decode.policy`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["AR", "SINGLE", "Outcome", "Plan", "Shape", "candidates", "drafted", "few", "filled", "shapes"]

TILE = 16
"""Queries of a step that cost about as much as one more."""
LITTLE = 6
"""Queries of alternates that are not worth a plan of their own."""
ENOUGH = 16
"""Alternates from which on another one comes in one step of a hundred."""


class Shape(NamedTuple):
    """What a step feeds (`tidar.layout.step`)."""

    drafts: int
    """K, the certain token among them."""
    proposals: int
    """P, which are those of the likeliest outcomes (`tidar.proposals`)."""
    masks: int
    """M, of each proposal."""
    alternates: int = 0
    """A, the likeliest (`tidar.proposals.alternates`)."""

    @property
    def pairs(self) -> int:
        """Alternates, the likelier half, that are followed by what would have been drafted behind them."""
        return self.alternates // 2

    @property
    def others(self) -> int:
        """Queries between drafts and masks."""
        return self.alternates + self.pairs

    @property
    def queries(self) -> int:
        """L."""
        return self.drafts + self.others + self.proposals * self.masks


class Outcome(NamedTuple):
    """What a step came to, in each row."""

    accepted: Sequence[int]
    """Drafts that stand, 1 … K."""
    behind: Sequence[int]
    """How far into their block of masks the next drafts begin: 0 if this outcome was drafted for, M if none serves."""
    places: Sequence[int]
    """Of this outcome, from 0, when the likeliest come first (`tidar.proposals.ranks`)."""
    met: Sequence[int]
    """Which of the alternates, from 0, the token behind the drafts is: then the next first draft is sure. -1 if none
    is."""
    sure: Sequence[int]
    """Drafts that alternates told, 0 to 2."""


SINGLE = Shape(1, 0, 1)
"""An autoregressive step."""


@dataclass(frozen=True)
class Plan:
    """What steps feed while it is followed.

    Attributes:
        method: ``ar``, ``linear`` or ``tidar``.
        draft_len: K, tokens verified together; also the masks of a proposal.
        proposals: P, of ``tidar``.
        alternates: A.
    """

    method: str
    draft_len: int = 1
    proposals: int = 0
    alternates: int = 0


AR = Plan("ar")


def shapes(plan: Plan) -> list[Shape]:
    """Of the steps that a plan goes round in."""
    k = plan.draft_len
    if plan.method == "ar" or k == 1:
        return [SINGLE]
    if plan.method == "linear":
        return [Shape(k, 0, k), Shape(1, 1, k)]
    return [Shape(k, plan.proposals, k, plan.alternates)]


def candidates(longest: int) -> Iterator[Plan]:
    """Plans worth comparing, for draft lengths up to ``longest``."""
    yield AR
    for k in sorted({k for k in (2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= longest} | ({longest} - {1})):
        yield Plan("linear", k)
        for count in sorted({min(count, k) for count in (1, 2, 3, 5, 8, k)}):
            yield Plan("tidar", k, count)
            if count <= 3:
                yield Plan("tidar", k, count, 2)


def filled(draft_len: int, proposals: int) -> Plan:
    """With as many alternates as fill the last tile of a step's queries, or where that is little another one; `ENOUGH`
    at most."""
    room = -draft_len * (1 + proposals) % TILE
    room += TILE * (room < LITTLE)
    return Plan("tidar", draft_len, proposals, min(ENOUGH, (2 * room + 1) // 3))  # half of them take two queries


def drafted(proposals: int, alternates: int = 0) -> str:
    """What is drafted for, in words."""
    words = f"{proposals} proposal{'s' * (proposals > 1)}"
    return f"{words}, {alternates} alternate{'s' * (alternates > 1)}" if alternates else words


def few(longest: int) -> Iterator[Plan]:
    """The plans among which most is decided, where each costs seconds to make ready (`tidar.fast`).

    One proposal fewer than the drafts fills tiles, and so does one fewer than a quarter or a half of them: 15, 3 and 1
    of 16 drafts make 256, 64 and 32 queries. Others leave room in their last tile, which alternates fill.
    """
    yield AR
    for k in sorted({longest, longest // 2, longest // 4} - {0, 1}, reverse=True):
        some = {k - 1} | ({3, 1} if k > longest // 4 else set()) | ({2} if k == longest > 2 else set())
        for count in sorted((n for n in some if n < k), reverse=True):
            yield Plan("tidar", k, count)
        for count in sorted({n for n in (max(3, k // 4 - 1), 2) if n < k}, reverse=True):
            yield filled(k, count)
        if k > longest // 4:
            yield Plan("linear", k)
