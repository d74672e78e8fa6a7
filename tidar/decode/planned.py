"""A decoder that changes its plan while it runs (`tidar.decode.policy`); the tokens do not notice."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from tidar import layout
from tidar.config import SamplingParams
from tidar.decode.clock import Times
from tidar.decode.planner import Acceptance
from tidar.decode.policy import Planning
from tidar.decode.tidar import TidarDecoder
from tidar.model import CausalLM

__all__ = ["PlannedDecoder", "measure"]


class PlannedDecoder(TidarDecoder):
    """Chooses method, draft length, proposals and alternates by itself.

    Args:
        model: a converted model.
        draft_len: the longest draft.
        times: seconds of a step by its queries, for each number of rows; what is missing is measured and kept there, so
            decoders of one model on one machine share it.
        acceptance: what such decoders have seen; it is added to.
    """

    def __init__(
        self, model: CausalLM, *, draft_len: int, times: dict[int, Times], acceptance: Acceptance | None = None
    ) -> None:
        super().__init__(model, draft_len=draft_len)
        self.policy: Planning = Planning(draft_len, acceptance=acceptance)
        self._known = times

    def prefill(self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        certain = super().prefill(prompts, params)
        rows = len(prompts)
        self.policy.open(rows)
        if rows not in self._known:
            self._known[rows] = Times(measure(self.model, rows))
        self.policy.begin(lambda _: self._known[rows])
        return certain

    def step(self) -> list[list[int]]:
        shape = self.shape()
        self._drafts = self._drafts[:, : shape.drafts]
        begin = time.perf_counter()
        certain = super().step()
        self.policy.learn(shape, self.outcome, time.perf_counter() - begin)
        return certain

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.policy.select(rows)


@torch.inference_mode()
def measure(model: CausalLM, rows: int) -> list[tuple[int, float]]:
    """Seconds of a forward and head over 1, 8 and 48 queries of ``rows`` rows without a prefix, best of three."""
    points = []
    for queries in (1, 8, 48):
        plan = layout.causal([0] * rows, queries, device=model.device)
        tokens = torch.zeros(rows, queries, dtype=torch.long, device=model.device)
        runs = []
        for _ in range(4):
            begin = time.perf_counter()
            model.head(model.hidden(tokens, plan)).argmax(-1).tolist()
            runs.append(time.perf_counter() - begin)
        points.append((queries, min(runs[1:])))
    return points
