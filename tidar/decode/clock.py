"""What steps take: measured beforehand, or learned while decoding."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Protocol

import numpy as np

from tidar.decode.plan import Shape

__all__ = ["DOUBT", "Clock", "Measured", "Times"]

DOUBT = 1.15
"""What has not been timed is believed to be slower by this: trying a plan costs steps too."""
RECENT = 9
"""Steps whose time is remembered."""


class Clock(Protocol):
    """Seconds that steps take."""

    def __call__(self, shape: Shape) -> float:
        """As far as it is known."""
        ...

    def update(self, shape: Shape, seconds: float) -> None:
        """Take the time of one step."""
        ...

    def sure_of(self, shape: Shape) -> bool:
        """It was measured, and not only supposed."""
        ...

    def ready(self, shape: Shape) -> bool:
        """Such a step can be taken at once."""
        ...


class Measured:
    """A `Clock` of times that were measured with care beforehand, and are not learned from.

    Args:
        seconds: of the steps that are ready; others would have to be compiled first.
    """

    def __init__(self, seconds: Mapping[Shape, float]) -> None:
        self._seconds = dict(seconds)

    def ready(self, shape: Shape) -> bool:
        return shape in self._seconds

    def __call__(self, shape: Shape) -> float:
        return self._seconds.get(shape, float("inf"))

    def update(self, shape: Shape, seconds: float) -> None:
        pass

    def sure_of(self, shape: Shape) -> bool:
        return shape in self._seconds


class Times:
    """A `Clock` that learns: of steps with as many queries the median of what was seen, else a line between measured
    points, stretched as steps that were seen took longer than it says (sampling, say, is not measured), and a doubt on
    top.

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

    def update(self, shape: Shape, seconds: float) -> None:
        """Take the time of one step."""
        self._seen[shape.queries].append(seconds)
        self._stretch.append(seconds / self._line(shape.queries))

    def __call__(self, shape: Shape) -> float:
        # The median, and not of one or two: a stall is not what the next step will take.
        if self.sure_of(shape):
            return median(self._seen[shape.queries])
        return DOUBT * self._line(shape.queries) * median(self._stretch)

    def ready(self, shape: Shape) -> bool:
        return True

    def sure_of(self, shape: Shape) -> bool:
        """Steps of so many queries have been seen often enough."""
        return len(self._seen[shape.queries]) >= 3

    def _line(self, queries: int) -> float:
        q, s = self._queries, self._seconds
        if queries <= q[-1]:
            return float(np.interp(queries, q, s))
        slope = (s[-1] - s[-2]) / (q[-1] - q[-2])
        return float(s[-1] + slope * (queries - q[-1]))
