"""Why a run may have to end before its end: SIGTERM, or its time is up."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

__all__ = ["Stop"]


class Stop:
    """From ``with`` on, SIGTERM asks for an end rather than ending the process.

    Args:
        max_seconds: wall-clock time; 0: no limit.
        stop_at: UNIX time; 0: none.
    """

    def __init__(self, max_seconds: float, stop_at: float = 0.0) -> None:
        self.max_seconds = max_seconds
        self.stop_at = stop_at
        self._asked = False
        self._begun = time.monotonic()
        self._before: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python takes signals there alone
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    @property
    def reason(self) -> int:
        """0: none; 1: time is up; 2: SIGTERM. Of several ranks' reasons the largest counts."""
        if self._asked:
            return 2
        late = 0 < self.stop_at < time.time()
        return int(late or 0 < self.max_seconds < time.monotonic() - self._begun)

    def said(self, reason: int) -> str:
        if reason == 2:
            return "by SIGTERM"
        if self.stop_at and not 0 < self.max_seconds < time.monotonic() - self._begun:
            return "at the time it was to stop at"
        return f"after {self.max_seconds:.0f} s"
