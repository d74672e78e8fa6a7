"""Decoding with captured graphs: the host launches steps ahead and reads what became certain behind them.

Between two reads the host does nothing but launch graphs. A row's end (end of text, stop string, limit) is seen a few
steps late: those steps are wasted, and their tokens are never read.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tidar.config import SamplingParams
from tidar.decode.plan import Outcome, Shape
from tidar.decode.policy import Policy
from tidar.errors import TidarError
from tidar.fast.engine import ROWS, Engine
from tidar.fast.network import Flags
from tidar.fast.slots import DEPTH, Slots
from tidar.kernels.reference_step import HEAD

__all__ = ["AHEAD", "FastDecoder"]

AHEAD = 2
"""Steps in flight: one runs while the host reads the one before."""


@dataclass
class _Flight:
    """A launched step."""

    slots: Slots
    shape: Shape
    entry: int
    done: torch.cuda.Event | None
    rows: list[int]


class FastDecoder:
    """A `tidar.decode.base.Decoder` on captured graphs; the same tokens as the plain ones.

    Args:
        engine: of the model.
        policy: what steps feed.
        ahead: steps in flight.

    Attributes:
        forwards: of the answers that are decoded now, the prompts' among them.
        taken: how many steps of each shape they took.
    """

    def __init__(self, engine: Engine, policy: Policy, *, ahead: int = AHEAD) -> None:
        if not 1 <= ahead < DEPTH:
            raise TidarError(f"steps ahead must lie between 1 and {DEPTH - 1}, not {ahead}")
        self._engine, self._policy, self._ahead = engine, policy, ahead
        self.forwards, self.taken = 0, Counter[Shape]()
        self._flying: deque[_Flight] = deque()
        self._read: deque[tuple[Shape, Outcome, list[list[int]]]] = deque()
        self._untold: tuple[Shape, Outcome] | None = None
        self._slots: Slots
        self._rows: list[int] = []
        self._pages: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        engine = self._engine
        self._slots, self._pages = engine.open(self, prompts, params)
        self._flags = Flags(
            sampling=any(p.temperature > 0 for p in params),
            filtering=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params),
            penalty=any(p.repetition_penalty != 1 for p in params),
        )
        self._rows = list(range(len(prompts)))
        self._launched = 0
        self.taken.clear()
        longest = engine.core.max_positions
        ends = [min(len(p) + each.max_new_tokens, longest) for p, each in zip(prompts, params, strict=True)]
        self._halfways = [(len(p) + end) // 2 for p, end in zip(prompts, ends, strict=True)]
        masks = self._policy.open(len(prompts))
        self._held = max(1, masks)
        certain, self.forwards = engine.prefill(self._slots, prompts, masks, self._flags)
        tokens = certain[: len(prompts)].tolist()
        self._check(bool(self._slots.bad.item()))
        self._plan()
        return [[token] for token in tokens]

    def step(self) -> list[list[int]]:
        if not self._read:
            while len(self._flying) < self._ahead:
                self._launch()
            self._learn()
            self._land()
        self._learn()
        shape, outcome, certain = self._read.popleft()
        self.forwards += 1
        self.taken[shape] += 1
        self._untold = shape, outcome
        return certain

    def _learn(self) -> None:
        """From the last step, when the next ones are launched: learning can take the host as long as a step the GPU."""
        if self._untold is not None:
            self._policy.learn(*self._untold)
            self._untold = None

    def close(self) -> None:
        self._learn()
        self._policy.close()

    def select(self, rows: list[int]) -> None:
        self._learn()
        self._rows, self._halfways = [self._rows[r] for r in rows], [self._halfways[r] for r in rows]
        for flight in self._flying:
            flight.rows = [flight.rows[r] for r in rows]
        self._read = deque(
            (shape, Outcome(*([each[r] for r in rows] for each in outcome)), [certain[r] for r in rows])
            for shape, outcome, certain in self._read
        )
        self._policy.select(rows)
        smaller = next((n for n in ROWS if n >= len(rows)), len(rows))
        if 2 * smaller <= self._slots.rows:
            # The rows move to a smaller batch, behind the steps in flight. Their pages stay, so only tables move.
            slots = self._engine.slots(self, len(rows), self._slots.pages)
            slots.adopt(self._slots, self._rows, lambda move: self._engine.captured(move, slots.rows))
            self._slots, self._rows, self._launched = slots, list(range(len(rows))), 0
            self._plan()

    def _launch(self) -> None:
        shape = self._policy.shape(self._held)
        self._engine.step(self._slots, shape, self._flags)()
        done = None
        if self._slots.device.type == "cuda":
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self._flying.append(_Flight(self._slots, shape, self._launched % DEPTH, done, list(self._rows)))
        self._launched += 1
        self._held = shape.masks if shape.proposals else 1

    def _land(self) -> None:
        """Wait for the oldest step in flight and read it."""
        flight = self._flying.popleft()
        if flight.done is not None:
            flight.done.synchronize()
        entry: list[list[int]] = flight.slots.ring[flight.entry, :, : HEAD + flight.shape.drafts].tolist()
        self._check(min(count for count, *_ in entry) < 0)
        rows = [entry[r] for r in flight.rows]
        outcome = Outcome(*([row[at] for row in rows] for at in range(HEAD)))
        self._read.append((flight.shape, outcome, [row[HEAD : HEAD + row[0]] for row in rows]))

    def _plan(self) -> None:
        self._policy.begin(lambda plans: self._engine.clock(self._slots, plans, self._flags, max(self._halfways)))

    def _check(self, bad: bool) -> None:
        if bad:
            raise TidarError("the model produced NaN or infinite logits; try --dtype float32, or check the checkpoint")

    def __del__(self) -> None:
        slots = getattr(self, "_slots", None)
        if slots is not None:
            for pages in self._pages:
                slots.pages.give(pages)
