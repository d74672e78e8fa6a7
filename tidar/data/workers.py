"""Processes that run lanes ahead of the steps.

They are not torch's DataLoader workers, whose death raises in the middle of whatever the trainer does, and which a
SIGTERM to all processes ends before the trainer has what it needs for its last step. These ignore SIGINT and SIGTERM,
send what they find in order, errors included, and end with the process that started them, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

from tidar.data.lanes import Lane, Lanes, Piece, State
from tidar.errors import TidarError

__all__ = ["Alone", "Interrupted", "Workers"]

AHEAD = 1 << 22
"""Tokens that a worker holds ready at most: 20 MB, and longer than a lane takes for a block."""
POLL = 0.2  # seconds


ENDS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """There is something else to do than to wait for data."""


class Alone:
    """Lanes in this process."""

    def __init__(self, lanes: Lanes, states: Mapping[int, State]) -> None:
        encoder = lanes.encoder()
        self._lanes = {number: Lane(lanes, number, encoder, state) for number, state in states.items()}

    def next(self, number: int, interrupted: Callable[[], bool]) -> Piece:
        """The next piece of lane ``number``."""
        return self._lanes[number].next()

    def close(self) -> None:
        """Nothing to end here."""


class Workers:
    """Lanes in ``count`` processes, or as many as there are lanes. Pieces must be taken in ascending order of lanes,
    of each lane one, again and again.

    Args:
        lanes: what the lanes have in common.
        states: of each lane to run.
    """

    def __init__(self, lanes: Lanes, states: Mapping[int, State], count: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that other threads hold
        numbers = sorted(states)
        count = min(count, len(numbers))
        self._workers: list[tuple[Any, Connection]] = []
        self._of: dict[int, int] = {}
        # Before multiprocessing waits for its children at exit.
        self._end = Finalize(self, _end, args=(self._workers,), exitpriority=100)
        for i in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), name=f"tidar data {i}")
            # Not before `_work` has said that they mean nothing here.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            theirs.close()  # the worker's is the last: its death ends the pipe
            self._workers.append((process, ours))
            self._of |= dict.fromkeys(numbers[i::count], i)
        for i, (_, ours) in enumerate(self._workers):  # when all are starting: each has much to import
            with suppress(OSError):  # one that is dead by now will be noticed
                ours.send((lanes, {number: states[number] for number in numbers[i::count]}))

    def next(self, number: int, interrupted: Callable[[], bool]) -> Piece:
        """The next piece of lane ``number``.

        Raises:
            TidarError: the lane says so, or its worker died.
            Interrupted: ``interrupted`` came to hold while nothing came.
        """
        process, ours = self._workers[self._of[number]]
        try:
            while not ours.poll(POLL):
                if interrupted():
                    raise Interrupted
            sent = ours.recv()
        except (EOFError, OSError) as error:
            process.join()
            how = f"ended with code {process.exitcode}, its own words are above"
            if process.exitcode < 0:
                how = f"was killed by signal {-process.exitcode}: lower workers or shuffle if memory was short"
            raise TidarError(f"{process.name} (process {process.pid}) {how}") from error
        if isinstance(sent, str):
            raise TidarError(sent)
        got, piece = sent
        assert got == number
        return Piece(*piece)

    def close(self) -> None:
        """End the processes."""
        self._end()


def _end(workers: Sequence[tuple[Any, Connection]]) -> None:
    for process, ours in workers:
        ours.close()
        process.kill()
        process.join()


def _work(parent: Connection) -> None:
    """Receive what lanes to run, send their pieces in turn, then what went wrong."""
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lanes, states = parent.recv()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    tokens = len(states) * lanes.rows * lanes.seq_len
    ready: queue.Queue[tuple[int, Piece] | str] = queue.Queue(len(states) * max(1, AHEAD // tokens))
    sending = threading.Thread(target=_send, args=(ready, parent), daemon=True)
    sending.start()
    try:
        encoder = lanes.encoder()
        mine = [Lane(lanes, number, encoder, state) for number, state in states.items()]
        while True:
            for lane in mine:
                ready.put((lane.number, lane.next()))
    except TidarError as error:
        ready.put(str(error))
        sending.join()  # the parent kills this process when it has heard


def _send(ready: queue.Queue[Any], parent: Connection) -> None:
    while True:
        item = ready.get()
        try:
            parent.send(item)
        except OSError:  # nobody listens any more
            os._exit(0)


def _end_with_parent() -> None:
    process = multiprocessing.parent_process()
    assert process is not None
    process.join()
    os._exit(0)
