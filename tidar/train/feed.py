"""What the steps of one rank are fed with: its micro-batches, and why there are none any more."""

from __future__ import annotations

import time
from collections.abc import Callable

from tidar.data.packing import PackedBatch, PackedData
from tidar.data.streaming import StreamedData
from tidar.data.workers import Interrupted
from tidar.errors import TidarError
from tidar.train.world import World

__all__ = ["LACKING", "Feed"]

LACKING = 3
"""A reason to stop that counts more than those of `tidar.train.stop.Stop`: a rank has no more data."""


class Feed:
    """Takes the micro-batches that fall to this rank.

    Args:
        data: at the place to go on from.
        accumulate: micro-batches of a step.
        world: the ranks among which they are divided.

    Attributes:
        waited: seconds that `take` took since somebody set it to 0.
    """

    def __init__(self, data: PackedData | StreamedData, accumulate: int, world: World) -> None:
        self.data, self.accumulate, self.world = data, accumulate, world
        self.waited = 0.0
        self._lack: TidarError | None = None

    def until(self, interrupted: Callable[[], bool]) -> None:
        """Have `take` give up when nothing comes and ``interrupted`` holds."""
        if isinstance(self.data, StreamedData):
            self.data.interrupted = interrupted

    def take(self) -> list[PackedBatch] | None:
        """The micro-batches of the next step; None if there are none any more, or it was interrupted."""
        begun = time.monotonic()
        found = []
        try:
            for index in range(self.accumulate):
                if index % self.world.size == self.world.rank:
                    found.append(self.data.next())
                else:
                    self.data.skip()
        except TidarError as error:
            self._lack = error
            return None
        except Interrupted:
            return None
        finally:
            self.waited += time.monotonic() - begun
        return found

    def reason(self, wish: int) -> int:
        """Why all ranks are to stop, if one of them lacks data or has the ``wish``; 0: they are not."""
        return int(self.world.most(LACKING if self._lack else wish))

    def complain(self, rest: str) -> None:
        """Raise on all ranks what one of them lacks, if any does, and the ``rest``."""

        def work() -> None:
            if self._lack:
                raise TidarError(f"{self._lack}{rest}") from self._lack

        self.world.each(work)
